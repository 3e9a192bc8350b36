package azure

import (
	"context"
	"errors"
	"fmt"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"

	"graindisk/backend"
)

var _ backend.BatchDeleter = (*Store)(nil)

// DeleteBatch implements backend.BatchDeleter. Azure's Blob Batch carries as many requests as a batch may
// name, each signed by itself.
func (s *Store) DeleteBatch(ctx context.Context, keys []string) []error {
	client := s.client() // the credential may change meanwhile; the parts are signed with this one
	batch, err := client.NewBatchBuilder()
	if err != nil {
		return s.failAll(ctx, keys, make([]error, len(keys)), err)
	}
	errs, sent := make([]error, len(keys)), []int(nil)
	for i, key := range keys {
		if len(keys) > backend.DeleteBatchMax {
			errs[i] = s.refuse("delete", key, "one of %d keys, at most %d go at once", len(keys), backend.DeleteBatchMax)
			continue
		}
		if errs[i] = s.begin(ctx, "delete", key); errs[i] != nil {
			continue
		}
		if err := batch.Delete(s.full(key), nil); err != nil {
			errs[i] = s.fail(ctx, "delete", key, err)
			continue
		}
		sent = append(sent, i)
	}
	if len(sent) == 0 {
		return orNil(errs)
	}
	answers, err := submit(ctx, client, batch)
	if err != nil {
		return s.failAll(ctx, keys, errs, err)
	}
	for n, i := range sent {
		switch err, answered := answers[n]; {
		case !answered:
			errs[i] = s.fail(ctx, "delete", keys[i], errors.New("the answer does not name it"))
		case !bloberror.HasCode(err, bloberror.BlobNotFound):
			errs[i] = s.fail(ctx, "delete", keys[i], err)
		}
	}
	return orNil(errs)
}

// submit sends a batch and returns what came of its parts. The SDK's parser trusts the numbers in the answer.
func submit(ctx context.Context, client *container.Client, batch *container.BatchBuilder) (answers map[int]error, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the answer cannot be read: %v", r)
		}
	}()
	out, err := client.SubmitBatch(ctx, batch, nil)
	if err != nil {
		return nil, err
	}
	answers = map[int]error{}
	for _, r := range out.Responses {
		if r.ContentID != nil {
			answers[*r.ContentID] = r.Error
		}
	}
	return answers, nil
}

// failAll puts err to all keys that have no error of their own.
func (s *Store) failAll(ctx context.Context, keys []string, errs []error, err error) []error {
	for i, key := range keys {
		if errs[i] == nil {
			errs[i] = s.fail(ctx, "delete", key, err)
		}
	}
	return errs
}

// orNil is errs, or nil if all of them are.
func orNil(errs []error) []error {
	for _, err := range errs {
		if err != nil {
			return errs
		}
	}
	return nil
}
