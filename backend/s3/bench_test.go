package s3_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awscreds "github.com/aws/aws-sdk-go-v2/credentials"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/backend/backendtest/miniotest"
	"graindisk/backend/transport"
	"graindisk/block"
)

// client is one way to speak to the server.
type client struct {
	name string
	read func(ctx context.Context, key string, p []byte, off int64) error
	put  func(ctx context.Context, key string, body []byte) error
}

const (
	benchObject = 16 << 20
	benchRead   = 64 << 10
	benchPut    = 8 << 20
)

// BenchmarkClients compares the driver with clients that do the same requests, one at a time against one MinIO:
// the SDK as it comes, minio-go, and net/http with nothing but a signature and, as the driver, the CRC32C of what
// is put. All of them have the driver's transport. cpu-µs is the time of this process alone, per request.
func BenchmarkClients(b *testing.B) {
	m := miniotest.Start(b)
	bucket := m.Bucket(b)
	body := backendtest.Body(1, benchObject)
	clients := []client{bareClient(b, m, bucket), driverClient(b, m, bucket), sdkClient(b, m, bucket), minioClient(b, m, bucket)}
	if err := clients[0].put(b.Context(), "object", body); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, benchRead)
	for _, c := range clients {
		b.Run("read=64KiB/"+c.name, func(b *testing.B) {
			backendtest.Measure(b, len(p), func(i int) error {
				off := i * benchRead % (benchObject - benchRead)
				if err := c.read(b.Context(), "object", p, int64(off)); err != nil {
					return err
				}
				if !bytes.Equal(p[:64], body[off:off+64]) {
					return errors.New("other bytes")
				}
				return nil
			})
		})
	}
	for _, c := range clients {
		b.Run("put=8MiB/"+c.name, func(b *testing.B) {
			backendtest.Measure(b, benchPut, func(i int) error { return c.put(b.Context(), fmt.Sprint("put-", i%4), body[:benchPut]) })
		})
	}
}

func benchTransport(b *testing.B) *http.Client {
	c, err := transport.New(transport.Options{})
	if err != nil {
		b.Fatal(err)
	}
	return c
}

// bareClient is net/http and a signature.
func bareClient(b *testing.B, m *miniotest.Server, bucket string) client {
	h, signer := benchTransport(b), v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
	creds := aws.Credentials{AccessKeyID: miniotest.AccessKey, SecretAccessKey: miniotest.SecretKey}
	do := func(r *http.Request, want int, into []byte) error {
		r.Header.Set("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD")
		if err := signer.SignHTTP(r.Context(), creds, r, "UNSIGNED-PAYLOAD", "s3", "us-east-1", time.Now()); err != nil {
			return err
		}
		resp, err := h.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != want {
			return errors.New(resp.Status)
		}
		if into == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			return err
		}
		_, err = io.ReadFull(resp.Body, into)
		return err
	}
	return client{"net-http",
		func(ctx context.Context, key string, p []byte, off int64) error {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, m.Endpoint+"/"+bucket+"/"+key, nil)
			if err != nil {
				return err
			}
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
			return do(r, http.StatusPartialContent, p)
		},
		func(ctx context.Context, key string, body []byte) error {
			r, err := http.NewRequestWithContext(ctx, http.MethodPut, m.Endpoint+"/"+bucket+"/"+key, bytes.NewReader(body))
			if err != nil {
				return err
			}
			r.Header.Set("X-Amz-Checksum-Crc32c", base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, block.CRC(body))))
			return do(r, http.StatusOK, nil)
		},
	}
}

func driverClient(b *testing.B, m *miniotest.Server, bucket string) client {
	s := m.Store(b, bucket, "")
	return client{"driver", s.ReadAt, func(ctx context.Context, key string, body []byte) error {
		_, err := s.Put(ctx, key, body, backend.Cond{})
		return err
	}}
}

// sdkClient is aws-sdk-go-v2, but for the SHA-256 of bodies, which would cost more than everything else.
func sdkClient(b *testing.B, m *miniotest.Server, bucket string) client {
	c := awss3.New(awss3.Options{
		Region: "us-east-1", BaseEndpoint: &m.Endpoint, UsePathStyle: true, HTTPClient: benchTransport(b),
		Credentials:                awscreds.NewStaticCredentialsProvider(miniotest.AccessKey, miniotest.SecretKey, ""),
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
	return client{"aws-sdk",
		func(ctx context.Context, key string, p []byte, off int64) error {
			out, err := c.GetObject(ctx, &awss3.GetObjectInput{
				Bucket: &bucket, Key: &key, Range: aws.String(fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1)),
			})
			if err != nil {
				return err
			}
			defer out.Body.Close()
			_, err = io.ReadFull(out.Body, p)
			return err
		},
		func(ctx context.Context, key string, body []byte) error {
			_, err := c.PutObject(ctx, &awss3.PutObjectInput{Bucket: &bucket, Key: &key, Body: bytes.NewReader(body)},
				awss3.WithAPIOptions(v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware))
			return err
		},
	}
}

func minioClient(b *testing.B, m *miniotest.Server, bucket string) client {
	c, err := minio.New(m.Address, &minio.Options{
		Creds: credentials.NewStaticV4(miniotest.AccessKey, miniotest.SecretKey, ""), Transport: benchTransport(b).Transport, Region: "us-east-1",
	})
	if err != nil {
		b.Fatal(err)
	}
	core := minio.Core{Client: c}
	return client{"minio-go",
		func(ctx context.Context, key string, p []byte, off int64) error {
			var o minio.GetObjectOptions
			if err := o.SetRange(off, off+int64(len(p))-1); err != nil {
				return err
			}
			body, _, _, err := core.GetObject(ctx, bucket, key, o)
			if err != nil {
				return err
			}
			defer body.Close()
			_, err = io.ReadFull(body, p)
			return err
		},
		func(ctx context.Context, key string, body []byte) error {
			_, err := c.PutObject(ctx, bucket, key, bytes.NewReader(body), int64(len(body)),
				minio.PutObjectOptions{DisableContentSha256: true, DisableMultipart: true})
			return err
		},
	}
}
