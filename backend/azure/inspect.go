package azure

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/lease"

	"graindisk/backend"
)

var _ backend.Inspector = (*Store)(nil)

// unseen is what only Azure's management API tells, to which a container's user has no access.
const unseen = "lifecycle rules, object replication and soft delete of containers are not to be seen from here: " +
	"look at `az storage account management-policy show` and `az storage account blob-service-properties show`; " +
	"a rule that deletes blobs or moves them to the archive tier by age destroys the pool"

// Inspect implements backend.Inspector: what the data plane tells of the container, of the account and of the
// signature in use. Whether blobs get versions is known once a put was answered.
func (s *Store) Inspect(ctx context.Context) ([]backend.Finding, error) {
	var found []backend.Finding
	for _, look := range []struct {
		name string
		see  func(context.Context) ([]backend.Finding, error)
	}{
		{"container", s.inspectContainer},
		{"account", s.inspectAccount},
		{"soft delete", s.inspectSoftDelete},
		{"access tier", s.inspectTier},
	} {
		fs, err := look.see(ctx)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			_, cause := classify(err)
			fs = []backend.Finding{{Name: look.name, Text: "not to be seen: " + cause.Error()}}
		}
		found = append(found, fs...)
	}
	found = append(found, s.inspectVersioning()...)
	found = append(found, inspectSAS(s.session.Load().container.URL(), time.Now())...)
	return append(found, backend.Finding{Name: "rules of the account", Text: unseen}), nil
}

func (s *Store) inspectContainer(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client().GetProperties(ctx, nil)
	if err != nil {
		return nil, err
	}
	var found []backend.Finding
	if deref(out.HasImmutabilityPolicy) || deref(out.HasLegalHold) {
		found = append(found, backend.Finding{Name: "immutability", Dangerous: true,
			Text: "the container has an immutability policy or a legal hold: the root cannot be changed and nothing be deleted"})
	}
	if deref(out.IsImmutableStorageWithVersioningEnabled) {
		found = append(found, backend.Finding{Name: "immutability", Dangerous: true,
			Text: "the container keeps immutable versions: objects that were changed or deleted stay and are paid for"})
	}
	if deref(out.BlobPublicAccess) != "" {
		found = append(found, backend.Finding{Name: "public access", Dangerous: true, Text: "anyone may read the blobs of the container"})
	}
	if deref(out.LeaseState) == lease.StateTypeLeased {
		found = append(found, backend.Finding{Name: "lease", Text: "the container is leased: nobody deletes it without that lease; its blobs are not affected"})
	}
	return found, nil
}

func (s *Store) inspectAccount(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client().GetAccountInfo(ctx, nil)
	if err != nil {
		return nil, err
	}
	var found []backend.Finding
	if deref(out.IsHierarchicalNamespaceEnabled) {
		found = append(found, backend.Finding{Name: "hierarchical namespace", Dangerous: true,
			Text: "is on: lists are not in byte order and show folders as blobs; use an account without it"})
	}
	if sku := string(deref(out.SKUName)); strings.Contains(sku, "GRS") || strings.Contains(sku, "GZRS") {
		found = append(found, backend.Finding{Name: "replication",
			Text: sku + ": after the account's failover to its other region the newest writes may be missing; treat the target as lost then"})
	}
	return found, nil
}

// inspectSoftDelete needs an account's key, or a signature for the account: one for the container does not do.
func (s *Store) inspectSoftDelete(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.session.Load().service.GetProperties(ctx, nil)
	if err != nil {
		return nil, err
	}
	if p := out.DeleteRetentionPolicy; p != nil && deref(p.Enabled) {
		return []backend.Finding{{Name: "soft delete",
			Text: fmt.Sprintf("is on: blobs that were deleted or overwritten stay, and are paid for, for %d days", deref(p.Days))}}, nil
	}
	return nil, nil
}

// inspectTier looks at the first blob, which takes the account's default.
func (s *Store) inspectTier(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client().NewListBlobsFlatPager(&container.ListBlobsFlatOptions{Prefix: to.Ptr(s.prefix), MaxResults: to.Ptr(int32(1))}).NextPage(ctx)
	if err != nil {
		return nil, err
	}
	if out.Segment == nil || len(out.Segment.BlobItems) == 0 || out.Segment.BlobItems[0].Properties == nil {
		return nil, errors.New("there is no blob to look at")
	}
	switch tier := deref(out.Segment.BlobItems[0].Properties.AccessTier); tier {
	case blob.AccessTierArchive:
		return []backend.Finding{{Name: "access tier", Dangerous: true, Text: "blobs are in the archive tier, where they cannot be read"}}, nil
	case blob.AccessTierCool, blob.AccessTierCold:
		return []backend.Finding{{Name: "access tier", Text: fmt.Sprintf(
			"blobs are in the tier %s: reading costs more, and what is deleted within its least time is paid for to the end of that", tier)}}, nil
	}
	return nil, nil
}

func (s *Store) inspectVersioning() []backend.Finding {
	switch {
	case s.versioned.Load():
		return []backend.Finding{{Name: "versioning", Dangerous: true,
			Text: "is on: deleted and overwritten blobs stay as old versions and are paid for; switch it off, or have a lifecycle rule delete previous versions"}}
	case !s.stored.Load():
		return []backend.Finding{{Name: "versioning", Text: "not to be seen: nothing was stored yet"}}
	}
	return nil
}

const (
	sasNeeds = "rwdl" // read, write, delete, list
	sasSoon  = 7 * 24 * time.Hour
)

// inspectSAS looks at the signature that a URL carries, if it does. The text tells nothing secret.
func inspectSAS(at string, now time.Time) []backend.Finding {
	u, err := url.Parse(at)
	if err != nil || u.Query().Get("sig") == "" {
		return nil
	}
	q := u.Query()
	var found []backend.Finding
	if may := q.Get("sp"); may != "" { // else a stored policy of the container says
		lacking := ""
		for _, p := range sasNeeds {
			if !strings.ContainsRune(may, p) {
				lacking += string(p)
			}
		}
		if lacking != "" {
			found = append(found, backend.Finding{Name: "SAS", Dangerous: true, Text: fmt.Sprintf("it allows %q and lacks %q of %q", may, lacking, sasNeeds)})
		}
	}
	ends, err := parseEnd(q.Get("se"))
	switch {
	case q.Get("se") == "":
		found = append(found, backend.Finding{Name: "SAS", Text: "a stored policy of the container says when it ends, which is not to be seen from here"})
	case err != nil:
		found = append(found, backend.Finding{Name: "SAS", Text: "when it ends cannot be read"})
	case ends.Sub(now) < sasSoon:
		found = append(found, backend.Finding{Name: "SAS", Dangerous: true,
			Text: "it ends at " + ends.Format(time.RFC3339) + ": then nothing can be stored; write a new one into credentials_file, where it is found without a restart"})
	default:
		found = append(found, backend.Finding{Name: "SAS", Text: "it ends at " + ends.Format(time.RFC3339)})
	}
	return found
}

// parseEnd reads any of the forms that a signature's times have.
func parseEnd(text string) (t time.Time, err error) {
	for _, form := range []string{time.RFC3339, "2006-01-02T15:04Z", time.DateOnly} {
		if t, err = time.Parse(form, text); err == nil {
			break
		}
	}
	return t, err
}
