package s3

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"graindisk/backend"
)

var _ backend.Inspector = (*Store)(nil)

// Inspect implements backend.Inspector: versioning, object lock and lifecycle rules of the
// bucket, and uploads that were never finished.
func (s *Store) Inspect(ctx context.Context) ([]backend.Finding, error) {
	var found []backend.Finding
	for _, look := range []struct {
		name string
		see  func(context.Context) ([]backend.Finding, error)
	}{
		{"versioning", s.inspectVersioning},
		{"object lock", s.inspectLock},
		{"lifecycle", s.inspectLifecycle},
		{unfinishedName, s.inspectUploads},
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
	return found, nil
}

func (s *Store) inspectVersioning(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client.GetBucketVersioning(ctx, &s3.GetBucketVersioningInput{Bucket: &s.bucket})
	if err != nil {
		return nil, err
	}
	if out.Status == types.BucketVersioningStatusEnabled {
		return []backend.Finding{{Name: "versioning", Dangerous: true,
			Text: "is on: deleted objects stay as old versions and are paid for; switch it off, or expire noncurrent versions"}}, nil
	}
	return nil, nil
}

func (s *Store) inspectLock(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client.GetObjectLockConfiguration(ctx, &s3.GetObjectLockConfigurationInput{Bucket: &s.bucket})
	if hasCode(err, "ObjectLockConfigurationNotFoundError") {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if c := out.ObjectLockConfiguration; c != nil && c.Rule != nil && c.Rule.DefaultRetention != nil {
		return []backend.Finding{{Name: "object lock", Dangerous: true,
			Text: fmt.Sprintf("new objects are locked (%s): the root cannot be changed and nothing be deleted", c.Rule.DefaultRetention.Mode)}}, nil
	}
	return nil, nil
}

// inspectLifecycle names the rules that bear on our objects.
func (s *Store) inspectLifecycle(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client.GetBucketLifecycleConfiguration(ctx, &s3.GetBucketLifecycleConfigurationInput{Bucket: &s.bucket})
	if hasCode(err, "NoSuchLifecycleConfiguration") {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []backend.Finding
	for _, r := range out.Rules {
		prefix := rulePrefix(r)
		if r.Status != types.ExpirationStatusEnabled || !strings.HasPrefix(prefix, s.prefix) && !strings.HasPrefix(s.prefix, prefix) {
			continue
		}
		name := "lifecycle"
		if id := aws.ToString(r.ID); id != "" {
			name += " " + id
		}
		if e := r.Expiration; e != nil && (e.Days != nil || e.Date != nil) {
			found = append(found, backend.Finding{Name: name, Dangerous: true, Text: "deletes objects by their age: a pool's objects are never too old"})
		}
		for _, t := range r.Transitions {
			switch t.StorageClass {
			case types.TransitionStorageClassGlacier, types.TransitionStorageClassDeepArchive:
				found = append(found, backend.Finding{Name: name, Dangerous: true,
					Text: fmt.Sprintf("moves objects to %s, from where they cannot be read at once", t.StorageClass)})
			}
		}
	}
	return found, nil
}

const (
	unfinishedName = "unfinished uploads"
	unfinishedAge  = time.Hour // younger ones may be under way
	uploadPagesMax = 20        // of a thousand each
)

// inspectUploads counts the uploads in parts that nobody finished or took away.
func (s *Store) inspectUploads(ctx context.Context) ([]backend.Finding, error) {
	old, first, now := 0, time.Time{}, time.Now()
	in := &s3.ListMultipartUploadsInput{Bucket: &s.bucket, Prefix: aws.String(s.prefix)}
	for range uploadPagesMax {
		out, err := s.client.ListMultipartUploads(ctx, in)
		if err != nil {
			return nil, err
		}
		for _, u := range out.Uploads {
			began := aws.ToTime(u.Initiated)
			if now.Sub(began) < unfinishedAge {
				continue
			}
			if old++; first.IsZero() || began.Before(first) {
				first = began
			}
		}
		if !aws.ToBool(out.IsTruncated) {
			break
		}
		in.KeyMarker, in.UploadIdMarker = out.NextKeyMarker, out.NextUploadIdMarker
	}
	if old == 0 {
		return nil, nil
	}
	return []backend.Finding{{Name: unfinishedName, Dangerous: true, Text: fmt.Sprintf(
		"%d since %s, left by processes that were killed: their parts are paid for; abort them, or add a lifecycle rule that does (AbortIncompleteMultipartUpload)",
		old, first.UTC().Format(time.DateOnly))}}, nil
}

func rulePrefix(r types.LifecycleRule) string {
	if f := r.Filter; f != nil {
		if f.And != nil {
			return aws.ToString(f.And.Prefix)
		}
		return aws.ToString(f.Prefix)
	}
	return "" // all objects
}

func hasCode(err error, code string) bool {
	var api smithy.APIError
	return errors.As(err, &api) && api.ErrorCode() == code
}
