package azure

import (
	"context"

	"graindisk/backend"
)

var _ backend.Inspector = (*Store)(nil)

// Inspect implements backend.Inspector: policies of the container. Those of the account (versions, soft
// delete, lifecycle) are not to be seen with the rights that a container's user has.
func (s *Store) Inspect(ctx context.Context) ([]backend.Finding, error) {
	out, err := s.client().GetProperties(ctx, nil)
	if err != nil {
		_, cause := classify(err)
		return nil, cause
	}
	found := []backend.Finding{{Name: "account", Text: "soft delete, versions and lifecycle rules of the account are not to be seen from here; they keep or delete blobs behind the pool's back"}}
	if deref(out.HasImmutabilityPolicy) || deref(out.HasLegalHold) {
		found = append(found, backend.Finding{Name: "immutability", Dangerous: true,
			Text: "the container has an immutability policy or a legal hold: the root cannot be changed and nothing be deleted"})
	}
	if deref(out.BlobPublicAccess) != "" {
		found = append(found, backend.Finding{Name: "public access", Dangerous: true, Text: "anyone may read the blobs of the container"})
	}
	return found, nil
}
