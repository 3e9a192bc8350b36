package s3

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"graindisk/backend"
	"graindisk/backend/transport"
	"graindisk/block"
)

// Put implements backend.Store. The ETag of most servers is the MD5 of the body: equal bytes have
// equal ETags.
func (s *Store) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	if c.Absent && c.Match != "" {
		return "", s.refuse("put", key, "a put cannot want the key both absent and matching")
	}
	if err := s.begin(ctx, "put", key); err != nil {
		return "", err
	}
	if int64(len(body)) > s.o.MultipartAbove {
		return s.putParts(ctx, key, body, c)
	}
	in := &s3.PutObjectInput{
		Bucket: &s.bucket, Key: s.full(key),
		Body:          bytes.NewReader(body),
		ContentLength: aws.Int64(int64(len(body))),
		ContentType:   contentType,
		StorageClass:  s.storageClass(int64(len(body))),
	}
	in.ServerSideEncryption, in.SSEKMSKeyId, in.BucketKeyEnabled = s.encryption()
	switch s.o.Checksum {
	case CRC32C:
		in.ChecksumAlgorithm, in.ChecksumCRC32C = types.ChecksumAlgorithmCrc32c, crcText(body)
	case MD5:
		in.ContentMD5 = md5Text(body)
	}
	opts := []func(*s3.Options){unsigned}
	switch {
	case c.Absent:
		in.IfNoneMatch = aws.String("*")
		opts = append(opts, once)
	case c.Match != "":
		in.IfMatch = aws.String(c.Match)
		opts = append(opts, once)
	}
	out, err := s.client.PutObject(ctx, in, opts...)
	if err != nil {
		return "", s.fail(ctx, "put", key, err)
	}
	return aws.ToString(out.ETag), nil
}

var contentType = aws.String("application/octet-stream")

// storageClass is that of an object of so many bytes; "" means the bucket's.
func (s *Store) storageClass(size int64) types.StorageClass {
	if size < storageClassMin {
		return ""
	}
	return types.StorageClass(s.o.StorageClass)
}

// encryption is what every request that makes an object says about it. A bucket's own key saves most of
// the requests to KMS.
func (s *Store) encryption() (sse types.ServerSideEncryption, key *string, bucketKey *bool) {
	if s.o.SSE == string(types.ServerSideEncryptionAwsKms) {
		bucketKey = aws.Bool(true)
	}
	if s.o.KMSKey != "" {
		key = &s.o.KMSKey
	}
	return types.ServerSideEncryption(s.o.SSE), key, bucketKey
}

// crcText is the CRC32C of p as headers have it.
func crcText(p []byte) *string {
	return aws.String(base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, block.CRC(p))))
}

func md5Text(p []byte) *string {
	sum := md5.Sum(p)
	return aws.String(base64.StdEncoding.EncodeToString(sum[:]))
}

// Get implements backend.Store.
func (s *Store) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	if err := s.begin(ctx, "get", key); err != nil {
		return nil, "", err
	}
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{
		Bucket: &s.bucket, Key: s.full(key), ChecksumMode: s.checksumMode(),
	})
	if err != nil {
		return nil, "", s.fail(ctx, "get", key, err)
	}
	defer out.Body.Close()
	size := aws.ToInt64(out.ContentLength)
	if size > max {
		return nil, "", s.refuse("get", key, "it has %d bytes, at most %d were expected", size, max)
	}
	var body bytes.Buffer
	body.Grow(int(min(size, transport.PreallocateMax)) + bytes.MinRead)
	// To the end and not just to the length, for there the SDK compares checksums.
	n, err := body.ReadFrom(io.LimitReader(out.Body, min(max, math.MaxInt64-1)+1))
	if err == nil && out.ContentLength != nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, "", s.fail(ctx, "get", key, fmt.Errorf("after %d bytes of %d: %w", n, size, err))
	}
	if n > max {
		return nil, "", s.refuse("get", key, "it has more than the %d bytes expected", max)
	}
	return body.Bytes(), aws.ToString(out.ETag), nil
}

// Stat implements backend.Store.
func (s *Store) Stat(ctx context.Context, key string) (backend.Info, error) {
	if err := s.begin(ctx, "stat", key); err != nil {
		return backend.Info{}, err
	}
	out, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: s.full(key)})
	if err != nil {
		return backend.Info{}, s.fail(ctx, "stat", key, s.whatIsMissing(ctx, err))
	}
	return backend.Info{
		Key: key, Size: aws.ToInt64(out.ContentLength),
		ETag: aws.ToString(out.ETag), Modified: aws.ToTime(out.LastModified),
	}, nil
}

// whatIsMissing replaces the error of a HEAD that found nothing if it is the bucket that is missing:
// the answer to a HEAD has no body to say so.
func (s *Store) whatIsMissing(ctx context.Context, err error) error {
	if class, _ := classify(err); class != backend.NotFound {
		return err
	}
	_, bucketErr := s.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &s.bucket})
	if class, _ := classify(bucketErr); class == backend.NotFound {
		return &types.NoSuchBucket{}
	}
	return err
}

// Delete implements backend.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := s.begin(ctx, "delete", key); err != nil {
		return err
	}
	_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: s.full(key)})
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() == "NoSuchKey" { // Amazon says 204, others may not
		return nil
	}
	return s.fail(ctx, "delete", key, err)
}

// List implements backend.Store.
func (s *Store) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	if err := backend.CheckList(prefix, max); err != nil {
		return nil, false, s.fail(ctx, "list", prefix, transport.Refuse(err))
	}
	in := &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: s.full(prefix), MaxKeys: aws.Int32(int32(max))}
	if after != "" {
		in.StartAfter = s.full(after)
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, false, s.fail(ctx, "list", prefix, err)
		}
		out, err := s.client.ListObjectsV2(ctx, in)
		if err != nil {
			return nil, false, s.fail(ctx, "list", prefix, err)
		}
		found, more := s.infos(out.Contents), aws.ToBool(out.IsTruncated)
		if len(found) > 0 || !more {
			return found, more, nil
		}
		in.ContinuationToken = out.NextContinuationToken // a page of what are no keys
	}
}

func (s *Store) infos(objects []types.Object) []backend.Info {
	found := make([]backend.Info, 0, len(objects))
	for _, o := range objects {
		key, ours := strings.CutPrefix(aws.ToString(o.Key), s.prefix)
		if !ours || backend.CheckKey(key) != nil {
			continue
		}
		found = append(found, backend.Info{
			Key: key, Size: aws.ToInt64(o.Size), ETag: aws.ToString(o.ETag), Modified: aws.ToTime(o.LastModified),
		})
	}
	return found
}

// checksumMode asks for the checksum that the store keeps.
func (s *Store) checksumMode() types.ChecksumMode {
	if s.o.Checksum == CRC32C {
		return types.ChecksumModeEnabled
	}
	return ""
}

func (s *Store) full(key string) *string { return aws.String(s.prefix + key) }

// begin is the start of every call on a key.
func (s *Store) begin(ctx context.Context, op, key string) error {
	if err := backend.CheckKey(key); err != nil {
		return s.fail(ctx, op, key, transport.Refuse(err))
	}
	if err := ctx.Err(); err != nil {
		return s.fail(ctx, op, key, err)
	}
	return nil
}

func (s *Store) refuse(op, key, format string, args ...any) error {
	return s.fail(context.Background(), op, key, transport.Refuse(fmt.Errorf(format, args...)))
}
