package s3

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"graindisk/backend/transport"
)

// getter sends ranged reads past the SDK, whose way from call to request and back costs half as much again as
// sending and reading 64 KiB (docs/PERFORMANCE.md): the same signature, connections and number of attempts.
// Safe for concurrent use.
type getter struct {
	http   *http.Client
	bucket *url.URL // of the bucket, in whichever style, without a slash at its end
	region string
	creds  aws.CredentialsProvider
	signer *v4.Signer
	skew   atomic.Int64 // what the store's clock is ahead of ours, in nanoseconds, as far as it complained

	attempts int
}

// newGetter asks the SDK where the bucket is.
func newGetter(ctx context.Context, o Options, region string, creds aws.CredentialsProvider, httpClient *http.Client) (*getter, error) {
	p := s3.EndpointParameters{Bucket: &o.Bucket, Region: &region, ForcePathStyle: &o.PathStyle}
	if o.Endpoint != "" {
		p.Endpoint = &o.Endpoint
	}
	at, err := s3.NewDefaultEndpointResolverV2().ResolveEndpoint(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("no address for bucket %s: %w", o.Bucket, err)
	}
	u := at.URI
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), ""
	return &getter{http: httpClient, bucket: &u, region: region, creds: creds, attempts: o.Attempts, signer: v4.NewSigner(func(s *v4.SignerOptions) {
		s.DisableURIPathEscaping = true // S3's own rule
	})}, nil
}

const (
	readBackoff  = 100 * time.Millisecond
	errorBodyMax = 64 << 10
	// noBody is the SHA-256 of nothing.
	noBody = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

// get asks for n bytes from off of the object of that name, again if the store fails for a moment. The caller
// closes the body.
func (g *getter) get(ctx context.Context, name string, off, n int64) (*http.Response, error) {
	for attempt := 1; ; attempt++ {
		resp, err := g.try(ctx, name, off, n)
		if err == nil || attempt == g.attempts || ctx.Err() != nil || !passes(err) {
			return resp, err
		}
		t := time.NewTimer(rand.N(readBackoff<<min(attempt, 3)) + time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, err
		}
	}
}

func (g *getter) try(ctx context.Context, name string, off, n int64) (*http.Response, error) {
	creds, err := g.creds.Retrieve(ctx)
	if err != nil {
		return nil, err
	}
	at := *g.bucket
	at.Path += "/" + name
	r := (&http.Request{
		Method: http.MethodGet, URL: &at, Host: at.Host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Range": {rangeOf(off, n)}, "X-Amz-Content-Sha256": {noBody}},
	}).WithContext(ctx)
	skew := time.Duration(g.skew.Load())
	if err := g.signer.SignHTTP(ctx, creds, r, noBody, "s3", g.region, time.Now().Add(skew)); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	resp, err := g.http.Do(r)
	if err != nil {
		return nil, &smithyhttp.RequestSendError{Err: err}
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		defer resp.Body.Close()
		err := failed(resp)
		if ahead, is := misdated(err); is {
			g.skew.Store(int64(skew + ahead))
		}
		return nil, err
	}
	return resp, nil
}

func rangeOf(off, n int64) string {
	b := strconv.AppendInt(append(make([]byte, 0, 48), "bytes="...), off, 10)
	return string(strconv.AppendInt(append(b, '-'), off+n-1, 10))
}

// failed is the error of an answer that is none, in the SDK's form.
func failed(resp *http.Response) *smithyhttp.ResponseError {
	var said struct {
		Code, Message string
	}
	_ = xml.NewDecoder(io.LimitReader(resp.Body, errorBodyMax)).Decode(&said) // some say nothing
	if said.Code == "" {
		said.Code = strings.ReplaceAll(http.StatusText(resp.StatusCode), " ", "")
	}
	return &smithyhttp.ResponseError{
		Response: &smithyhttp.Response{Response: resp},
		Err:      &smithy.GenericAPIError{Code: said.Code, Message: said.Message},
	}
}

// ReadAt implements backend.Store.
func (s *Store) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	if off < 0 || off > math.MaxInt64-int64(len(p)) {
		return s.refuse("read", key, "offset %d", off)
	}
	if err := s.begin(ctx, "read", key); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	resp, err := s.getter.get(ctx, s.prefix+key, off, int64(len(p)))
	if err != nil {
		return s.fail(ctx, "read", key, err)
	}
	defer resp.Body.Close()
	if err := transport.CheckRange(resp.Header.Get("Content-Range"), off, int64(len(p))); err != nil {
		return s.fail(ctx, "read", key, err)
	}
	if n, err := io.ReadFull(resp.Body, p); err != nil {
		return s.fail(ctx, "read", key, fmt.Errorf("after %d bytes of %d: %w", n, len(p), err))
	}
	return nil
}
