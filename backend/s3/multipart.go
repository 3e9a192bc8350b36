package s3

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"

	"graindisk/backend"
)

const (
	partBytes       = 8 << 20 // of an upload in parts; S3 takes from 5 MiB, and 10 000 of them
	partsAtOnce     = 4
	abortTimeout    = 5 * time.Second
	abortTimeoutEnd = time.Second // if the caller has no time left
)

// putParts is Put for large bodies. The object comes into being with the last request, which carries the
// condition and is sent once.
func (s *Store) putParts(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	id, err := s.beginParts(ctx, key, int64(len(body)), s.o.Checksum == CRC32C)
	if err != nil {
		return "", s.fail(ctx, "put", key, err)
	}
	parts, err := s.uploadParts(ctx, key, id, body)
	if err != nil {
		s.abort(ctx, key, id)
		return "", s.fail(ctx, "put", key, err)
	}
	in := &s3.CompleteMultipartUploadInput{MpuObjectSize: aws.Int64(int64(len(body)))}
	if s.o.Checksum == CRC32C {
		in.ChecksumType, in.ChecksumCRC32C = types.ChecksumTypeFullObject, crcText(body)
	}
	return s.finishParts(ctx, "put", key, id, parts, c, in)
}

// beginParts names an upload. One whose reply is lost stays behind; Inspect finds it.
func (s *Store) beginParts(ctx context.Context, key string, size int64, crc bool) (id string, err error) {
	in := &s3.CreateMultipartUploadInput{Bucket: &s.bucket, Key: s.full(key), ContentType: contentType}
	in.StorageClass = s.storageClass(size)
	in.ServerSideEncryption, in.SSEKMSKeyId, in.BucketKeyEnabled = s.encryption()
	if crc {
		in.ChecksumAlgorithm, in.ChecksumType = types.ChecksumAlgorithmCrc32c, types.ChecksumTypeFullObject
	}
	out, err := s.client.CreateMultipartUpload(ctx, in)
	if err != nil {
		return "", err
	}
	return aws.ToString(out.UploadId), nil
}

func (s *Store) uploadParts(ctx context.Context, key, id string, body []byte) ([]types.CompletedPart, error) {
	parts := make([]types.CompletedPart, (len(body)+partBytes-1)/partBytes)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(partsAtOnce)
	for i := range parts {
		g.Go(func() (err error) {
			piece := body[i*partBytes : min((i+1)*partBytes, len(body))]
			parts[i], err = s.uploadPart(ctx, key, id, int32(i+1), piece)
			return err
		})
	}
	return parts, g.Wait()
}

func (s *Store) uploadPart(ctx context.Context, key, id string, number int32, piece []byte) (types.CompletedPart, error) {
	in := &s3.UploadPartInput{
		Bucket: &s.bucket, Key: s.full(key), UploadId: &id, PartNumber: &number,
		Body: bytes.NewReader(piece), ContentLength: aws.Int64(int64(len(piece))),
	}
	switch s.o.Checksum {
	case CRC32C:
		in.ChecksumAlgorithm, in.ChecksumCRC32C = types.ChecksumAlgorithmCrc32c, crcText(piece)
	case MD5:
		in.ContentMD5 = md5Text(piece)
	}
	out, err := s.client.UploadPart(ctx, in, unsigned)
	if err != nil {
		return types.CompletedPart{}, fmt.Errorf("part %d: %w", number, err)
	}
	return types.CompletedPart{PartNumber: &number, ETag: out.ETag, ChecksumCRC32C: out.ChecksumCRC32C}, nil
}

// finishParts makes the object of its parts, if c holds. Whatever fails is taken away; an upload whose
// completion took effect is no longer there to be.
func (s *Store) finishParts(ctx context.Context, op, key, id string, parts []types.CompletedPart, c backend.Cond, in *s3.CompleteMultipartUploadInput) (string, error) {
	in.Bucket, in.Key, in.UploadId = &s.bucket, s.full(key), &id
	in.MultipartUpload = &types.CompletedMultipartUpload{Parts: parts}
	switch {
	case c.Absent:
		in.IfNoneMatch = aws.String("*")
	case c.Match != "":
		in.IfMatch = aws.String(c.Match)
	}
	out, err := s.client.CompleteMultipartUpload(ctx, in, once)
	if err != nil {
		s.abort(ctx, key, id)
		return "", s.fail(ctx, op, key, err)
	}
	return aws.ToString(out.ETag), nil
}

// abort takes an upload's parts away, also when ctx has ended; what it cannot reach stays, and Inspect finds it.
func (s *Store) abort(ctx context.Context, key, id string) {
	patience := abortTimeout
	if ctx.Err() != nil {
		patience = abortTimeoutEnd
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	_, _ = s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &s.bucket, Key: s.full(key), UploadId: &id})
}
