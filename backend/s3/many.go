package s3

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"graindisk/backend"
)

var (
	_ backend.BatchDeleter = (*Store)(nil)
	_ backend.Copier       = (*Store)(nil)
)

// DeleteBatch implements backend.BatchDeleter. A server that does not know the request is not asked again.
func (s *Store) DeleteBatch(ctx context.Context, keys []string) []error {
	if s.noBatches.Load() {
		return s.refuseBatch(keys)
	}
	var errs []error
	var ids []types.ObjectIdentifier
	at := map[string][]int{} // by the name in the bucket
	for i, key := range keys {
		err := s.begin(ctx, "delete", key)
		if len(keys) > backend.DeleteBatchMax {
			err = s.refuse("delete", key, "one of %d keys, at most %d go at once", len(keys), backend.DeleteBatchMax)
		}
		if err != nil {
			errs = backend.SetError(errs, len(keys), i, err)
			continue
		}
		name := *s.full(key)
		if at[name] == nil {
			ids = append(ids, types.ObjectIdentifier{Key: &name})
		}
		at[name] = append(at[name], i)
	}
	if len(ids) == 0 {
		return errs
	}
	in := &s3.DeleteObjectsInput{Bucket: &s.bucket, Delete: &types.Delete{Objects: ids}}
	if s.o.Checksum == CRC32C {
		in.ChecksumAlgorithm = types.ChecksumAlgorithmCrc32c
	}
	out, err := s.client.DeleteObjects(ctx, in, s.bodyChecksum)
	if unknownRequest(err) {
		s.noBatches.Store(true)
		return s.refuseBatch(keys)
	}
	if err != nil {
		out = &s3.DeleteObjectsOutput{}
	} else {
		err = errors.New("the store's answer does not name it")
	}
	bad := s.leftOver(out, at, err)
	for name, indices := range at {
		for _, i := range indices {
			errs = backend.SetError(errs, len(keys), i, s.fail(ctx, "delete", keys[i], bad[name]))
		}
	}
	return errs
}

// refuseBatch refuses each of keys, since the server knows no batches.
func (s *Store) refuseBatch(keys []string) (errs []error) {
	for _, key := range keys {
		errs = append(errs, s.refuse("delete", key, "in a batch: %w", errors.ErrUnsupported))
	}
	return errs
}

// leftOver says what hinders those objects that the answer does not call deleted: the answer's own word, or err.
func (s *Store) leftOver(out *s3.DeleteObjectsOutput, asked map[string][]int, err error) map[string]error {
	bad := make(map[string]error, len(asked))
	for name := range asked {
		bad[name] = err
	}
	for _, d := range out.Deleted {
		delete(bad, aws.ToString(d.Key))
	}
	for _, e := range out.Errors {
		if code := aws.ToString(e.Code); code == "NoSuchKey" {
			delete(bad, aws.ToString(e.Key))
		} else {
			bad[aws.ToString(e.Key)] = &smithy.GenericAPIError{Code: code, Message: aws.ToString(e.Message)}
		}
	}
	return bad
}

// unknownRequest tells that a server does not offer what it was asked for.
func unknownRequest(err error) bool {
	var response *smithyhttp.ResponseError
	if !errors.As(err, &response) {
		return false
	}
	status := response.HTTPStatusCode()
	return status == http.StatusNotImplemented || status == http.StatusMethodNotAllowed
}

// bodyChecksum puts the checksum of the configuration's choice on a request that must have one: where CRC32C
// is not wanted, the MD5 that was asked for before there was a choice.
func (s *Store) bodyChecksum(o *s3.Options) {
	if s.o.Checksum == CRC32C {
		return
	}
	o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
		if _, err := stack.Finalize.Remove("AWSChecksum:ComputeInputPayloadChecksum"); err != nil {
			return err
		}
		return smithyhttp.AddContentChecksumMiddleware(stack)
	})
}

// copyBytesMax is how much S3 copies by one request.
const copyBytesMax = 5 << 30

// CopyFrom implements backend.Copier. With a condition it is an upload of one part, since servers keep
// conditions at its completion, but not those of a COPY.
func (s *Store) CopyFrom(ctx context.Context, key string, from backend.Store, fromKey string, c backend.Cond) (string, error) {
	if c.Absent && c.Match != "" {
		return "", s.refuse("copy", key, "a copy cannot want the key both absent and matching")
	}
	for _, k := range []string{key, fromKey} {
		if err := s.begin(ctx, "copy", k); err != nil {
			return "", err
		}
	}
	src, ok := backend.Innermost(from).(*Store)
	if !ok || src.service != s.service {
		return "", s.refuse("copy", key, "from %s: %w", from, errors.ErrUnsupported)
	}
	there, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &src.bucket, Key: src.full(fromKey)})
	if err != nil {
		return "", src.fail(ctx, "copy", fromKey, src.whatIsMissing(ctx, err))
	}
	size := aws.ToInt64(there.ContentLength)
	if size > copyBytesMax {
		return "", s.refuse("copy", key, "%d bytes: %w", size, errors.ErrUnsupported)
	}
	source := aws.String(src.bucket + "/" + *src.full(fromKey)) // of a key's bytes none needs escaping
	if c == (backend.Cond{}) {
		return s.copyWhole(ctx, key, source, there.ETag, size)
	}
	if size == 0 { // makes no part
		return s.Put(ctx, key, nil, c)
	}
	return s.copyAsPart(ctx, key, source, there.ETag, size, c)
}

func (s *Store) copyWhole(ctx context.Context, key string, source, etag *string, size int64) (string, error) {
	in := &s3.CopyObjectInput{
		Bucket: &s.bucket, Key: s.full(key), CopySource: source, CopySourceIfMatch: etag, StorageClass: s.storageClass(size),
	}
	in.ServerSideEncryption, in.SSEKMSKeyId, in.BucketKeyEnabled = s.encryption()
	out, err := s.client.CopyObject(ctx, in)
	if err != nil || out.CopyObjectResult == nil {
		return "", s.fail(ctx, "copy", key, sourceChanged(err))
	}
	return aws.ToString(out.CopyObjectResult.ETag), nil
}

func (s *Store) copyAsPart(ctx context.Context, key string, source, etag *string, size int64, c backend.Cond) (string, error) {
	id, err := s.beginParts(ctx, key, size, false) // MinIO sums up no parts that it copies itself
	if err != nil {
		return "", s.fail(ctx, "copy", key, err)
	}
	one := aws.Int32(1)
	out, err := s.client.UploadPartCopy(ctx, &s3.UploadPartCopyInput{
		Bucket: &s.bucket, Key: s.full(key), UploadId: &id, PartNumber: one, CopySource: source, CopySourceIfMatch: etag,
	})
	if err != nil || out.CopyPartResult == nil {
		s.abort(ctx, key, id)
		return "", s.fail(ctx, "copy", key, sourceChanged(err))
	}
	parts := []types.CompletedPart{{PartNumber: one, ETag: out.CopyPartResult.ETag}}
	return s.finishParts(ctx, "copy", key, id, parts, c, &s3.CompleteMultipartUploadInput{})
}

// sourceChanged keeps a refusal that concerns the source from being read as one of the caller's condition.
func sourceChanged(err error) error {
	class, cause := classify(err)
	switch class {
	case 0:
		return errors.New("the store's answer says nothing")
	case backend.Precondition:
		return fmt.Errorf("the source changed meanwhile: %v", cause)
	}
	return err
}
