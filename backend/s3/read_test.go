package s3

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	"graindisk/backend"
)

// TestReadsFollowTheStoresClock refuses what is dated more than a minute from the store's time, which is an hour ahead.
func TestReadsFollowTheStoresClock(t *testing.T) {
	const ahead = time.Hour
	s, requests := fakeStore(t, func(w http.ResponseWriter, r *http.Request) {
		now := time.Now().Add(ahead)
		w.Header().Set("Date", now.UTC().Format(http.TimeFormat))
		dated, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
		if err != nil {
			t.Error(err)
		}
		if d := dated.Sub(now); d < -time.Minute || d > time.Minute {
			answer(403, "RequestTimeTooSkewed")(w, r)
			return
		}
		w.Header().Set("Content-Range", "bytes 0-0/1")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write([]byte("x"))
	})
	for range 3 {
		if err := s.ReadAt(t.Context(), "k", make([]byte, 1), 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := requests.Load(); n != 1+3 {
		t.Errorf("%d requests", n)
	}
}

// TestReadsGoWhereEverythingElseGoes compares the address, the region and the keys of a read with those of the
// SDK's own request, in every style.
func TestReadsGoWhereEverythingElseGoes(t *testing.T) {
	for _, o := range []Options{
		{Bucket: "some-bucket", Region: "eu-central-1"},
		{Bucket: "some-bucket", Region: "us-east-1", Prefix: "p/q"},
		{Bucket: "some-bucket", Region: "eu-central-1", PathStyle: true},
		{Bucket: "dotted.bucket", Region: "eu-central-1"},
		{Bucket: "some-bucket", Region: "cn-north-1"},
		{Bucket: "some-bucket", Endpoint: "http://store.example:9000/"},
		{Bucket: "some-bucket", Endpoint: "http://store.example:9000", PathStyle: true},
		{Bucket: "some-bucket", Endpoint: "http://127.0.0.1:9000", Region: "r"}, // an address has no hosts below it
	} {
		o.AccessKey, o.SecretKey, o.SessionToken = "key", "s", "token"
		s, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		spy := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			scope := r.Header.Get("Authorization")
			scope = scope[strings.Index(scope, "Credential="):strings.Index(scope, ", SignedHeaders")]
			got = append(got, fmt.Sprintln(r.Method, r.URL.Scheme, r.URL.Host, r.URL.Path, scope, r.Header.Get("X-Amz-Security-Token"), r.Header.Get("Range")))
			return &http.Response{StatusCode: http.StatusNotFound, Header: http.Header{}, Body: http.NoBody, Request: r}, nil
		})}
		s.getter.http = spy
		opts := s.client.Options()
		opts.HTTPClient = spy
		s.client = awss3.New(opts)
		_ = s.ReadAt(t.Context(), "a/k", make([]byte, 10), 5)
		_, _, _ = s.Get(t.Context(), "a/k", 10)
		if len(got) != 2 {
			t.Fatalf("%+v: %d requests", o.Bucket, len(got))
		}
		want := strings.TrimSpace(got[1]) + " bytes=5-14"
		if strings.TrimSpace(got[0]) != want {
			t.Errorf("read: %swant: %s", got[0], want)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestReadEndsWithItsContext(t *testing.T) {
	s, requests := fakeStore(t, answer(500, "InternalError"))
	ctx, cancel := context.WithCancel(t.Context())
	s.getter.http.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
		cancel()
		return nil, fmt.Errorf("no route")
	}
	if err := s.ReadAt(ctx, "k", make([]byte, 1), 0); backend.ClassOf(err) != backend.Transient {
		t.Errorf("read gives %v", err)
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests", n)
	}
}
