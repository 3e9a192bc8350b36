package s3_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/backend/backendtest/miniotest"
	"graindisk/backend/s3"
)

const inParts = 5 << 20 // the least that may be set

// kms is a key of the server's own for SSE-S3 and SSE-KMS.
var kms = "test-key:" + base64.StdEncoding.EncodeToString(make([]byte, 32))

func open(t *testing.T, o s3.Options) *s3.Store {
	t.Helper()
	s, err := s3.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// unfinished counts the uploads in parts that are left of one object. This server lists by whole names alone.
func unfinished(t *testing.T, m *miniotest.Server, bucket, name string) (n int) {
	t.Helper()
	for u := range m.Client().ListIncompleteUploads(t.Context(), bucket, name, true) {
		if u.Err != nil {
			t.Fatal(u.Err)
		}
		n++
	}
	return n
}

func testParts(t *testing.T, m *miniotest.Server) {
	for _, sum := range []s3.Checksum{s3.CRC32C, s3.MD5, s3.None} {
		o := m.Options(m.Bucket(t), "p")
		o.MultipartAbove, o.Checksum = inParts, sum
		s := open(t, o)
		for _, size := range []int{inParts, inParts + 1, 8 << 20, 8<<20 + 1, 20<<20 + 3} {
			key, body := fmt.Sprintf("seg/%d", size), backendtest.Body(uint64(size), size)
			etag, err := s.Put(t.Context(), key, body, backend.Cond{Absent: true})
			if err != nil {
				t.Fatalf("%s, %d bytes: %v", sum, size, err)
			}
			if parts := strings.Contains(etag, "-"); parts != (size > inParts) {
				t.Errorf("%d bytes have the etag %s", size, etag)
			}
			got, gotTag, err := s.Get(t.Context(), key, int64(size))
			if err != nil || !bytes.Equal(got, body) || gotTag != etag {
				t.Errorf("%s, %d bytes: got %d, etag %s of %s, %v", sum, size, len(got), gotTag, etag, err)
			}
			info, err := m.Client().StatObject(t.Context(), o.Bucket, "p/"+key, minio.StatObjectOptions{Checksum: true})
			if err != nil || (info.ChecksumCRC32C != "") != (sum == s3.CRC32C) || strings.Contains(info.ChecksumCRC32C, "-") {
				t.Errorf("%s, %d bytes: the store keeps the CRC32C %q of it, %v", sum, size, info.ChecksumCRC32C, err)
			}
		}
	}
}

// testPartsConditions holds an object that is put in parts to the conditions of one that is not.
func testPartsConditions(t *testing.T, m *miniotest.Server) {
	o := m.Options(m.Bucket(t), "p")
	o.MultipartAbove = inParts
	s, ctx := open(t, o), t.Context()
	body := func(i int) []byte { return backendtest.Body(uint64(i), inParts+1+i) }
	holds := func(i int) (etag string) {
		got, etag, err := s.Get(ctx, "k", 2*inParts)
		if err != nil || !bytes.Equal(got, body(i)) {
			t.Fatalf("%d bytes, %v; not version %d", len(got), err, i)
		}
		return etag
	}
	const racers = 4
	errs := make([]error, racers)
	var wg sync.WaitGroup
	for i := range racers {
		wg.Go(func() { _, errs[i] = s.Put(ctx, "k", body(i), backend.Cond{Absent: true}) })
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		if err == nil && winner >= 0 {
			t.Fatalf("both %d and %d created it", winner, i)
		} else if err == nil {
			winner = i
		} else if c := backend.ClassOf(err); c != backend.Precondition && c != backend.Transient {
			t.Errorf("racer %d: %v", i, err)
		}
	}
	if winner < 0 {
		t.Fatalf("nobody created it: %v", errs)
	}
	first := holds(winner)
	if _, err := s.Put(ctx, "k", body(7), backend.Cond{Absent: true}); backend.ClassOf(err) != backend.Precondition {
		t.Errorf("over an object: %v", err)
	}
	if _, err := s.Put(ctx, "k", body(8), backend.Cond{Match: first}); err != nil {
		t.Errorf("a put that matches: %v", err)
	}
	if second := holds(8); second == first {
		t.Errorf("the etag is still %s", first)
	}
	if _, err := s.Put(ctx, "k", body(9), backend.Cond{Match: first}); backend.ClassOf(err) != backend.Precondition {
		t.Errorf("a put that matches no longer: %v", err)
	}
	if _, err := s.Put(ctx, "none", body(9), backend.Cond{Match: first}); backend.ClassOf(err) != backend.Precondition && backend.ClassOf(err) != backend.NotFound {
		t.Errorf("a put that matches nothing: %v", err)
	}
	holds(8)
	for _, name := range []string{"p/k", "p/none"} {
		if n := unfinished(t, m, o.Bucket, name); n != 0 {
			t.Errorf("%d uploads of %s are left", n, name)
		}
	}
}

// testPartsFail refuses the n-th request of an upload in parts on its way to the server, for good.
func testPartsFail(t *testing.T, m *miniotest.Server) {
	at, err := url.Parse(m.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		refuse func(*http.Request) bool
	}{
		{"a part", func(r *http.Request) bool { return r.URL.Query().Get("partNumber") == "2" }},
		{"the completion", func(r *http.Request) bool { return r.Method == http.MethodPost && r.URL.Query().Has("uploadId") }},
	} {
		var refused, aborts atomic.Int64
		proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(at)
			r.Out.Host = r.In.Host // as signed
		}}
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c.refuse(r) {
				refused.Add(1)
				_, _ = io.Copy(io.Discard, r.Body)
				http.Error(w, "", http.StatusInternalServerError)
				return
			}
			if r.Method == http.MethodDelete {
				aborts.Add(1)
			}
			proxy.ServeHTTP(w, r)
		}))
		o := m.Options(m.Bucket(t), "")
		o.MultipartAbove, o.Endpoint = inParts, server.URL
		_, err := open(t, o).Put(t.Context(), "k", backendtest.Body(1, 20<<20), backend.Cond{Absent: true})
		if err == nil || backend.ClassOf(err) != backend.Transient {
			t.Errorf("%s: %v", c.name, err)
		}
		if refused.Load() == 0 || aborts.Load() != 1 {
			t.Errorf("%s: refused %d times, %d aborts", c.name, refused.Load(), aborts.Load())
		}
		if n := unfinished(t, m, o.Bucket, "k"); n != 0 {
			t.Errorf("%s: %d uploads are left", c.name, n)
		}
		if _, err := m.Store(t, o.Bucket, "").Stat(t.Context(), "k"); backend.ClassOf(err) != backend.NotFound {
			t.Errorf("%s: stat gives %v", c.name, err)
		}
		server.Close()
	}
}

// testObjectOptions has objects made in each of the ways there are, and asks another client what they are.
func testObjectOptions(t *testing.T, m *miniotest.Server) {
	ctx := t.Context()
	for _, c := range []struct {
		change func(*s3.Options)
		header string
		small  string // of objects below 128 KiB
		large  string
	}{
		{func(o *s3.Options) { o.StorageClass = "REDUCED_REDUNDANCY" }, "X-Amz-Storage-Class", "", "REDUCED_REDUNDANCY"},
		{func(o *s3.Options) { o.SSE = "AES256" }, "X-Amz-Server-Side-Encryption", "AES256", "AES256"},
		{func(o *s3.Options) { o.SSE = "aws:kms" }, "X-Amz-Server-Side-Encryption", "aws:kms", "aws:kms"},
		{func(o *s3.Options) { o.SSE, o.KMSKey = "aws:kms", "test-key" }, "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id", "test-key", "test-key"},
		{func(o *s3.Options) {}, "X-Amz-Server-Side-Encryption", "", ""},
	} {
		o := m.Options(m.Bucket(t), "")
		o.MultipartAbove = inParts
		c.change(&o)
		s := open(t, o)
		for size, want := range map[int]string{1000: c.small, 128 << 10: c.large, inParts + 1: c.large} {
			body := backendtest.Body(uint64(size), size)
			if _, err := s.Put(ctx, "put", body, backend.Cond{}); err != nil {
				t.Fatal(err)
			}
			if _, err := backend.Copy(ctx, s, "copied", s, "put", 0, backend.Cond{}); err != nil {
				t.Fatal(err)
			}
			if err := s.Delete(ctx, "copied-if"); err != nil {
				t.Fatal(err)
			}
			if _, err := backend.Copy(ctx, s, "copied-if", s, "put", 0, backend.Cond{Absent: true}); err != nil {
				t.Fatal(err)
			}
			for _, key := range []string{"put", "copied", "copied-if"} {
				info, err := m.Client().StatObject(ctx, o.Bucket, key, minio.StatObjectOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if got := info.Metadata.Get(c.header); !strings.HasSuffix(got, want) || want == "" && got != "" {
					t.Errorf("%s of %d bytes: %s is %q, want %q", key, size, c.header, got, want)
				}
				if got, _, err := s.Get(ctx, key, int64(size)); err != nil || !bytes.Equal(got, body) {
					t.Errorf("%s of %d bytes with %+v: %d bytes, %v", key, size, c.header, len(got), err)
				}
			}
		}
	}
}

// testChecksums works with each kind, batches included, and lets another client look.
func testChecksums(t *testing.T, m *miniotest.Server) {
	for _, sum := range []s3.Checksum{s3.CRC32C, s3.MD5, s3.None} {
		o := m.Options(m.Bucket(t), "")
		o.Checksum = sum
		works(t, o)
		s := open(t, o)
		for _, key := range []string{"a", "b"} {
			if _, err := s.Put(t.Context(), key, []byte(key), backend.Cond{}); err != nil {
				t.Fatal(err)
			}
		}
		if errs := s.DeleteBatch(t.Context(), []string{"a", "b", "c"}); errs != nil {
			t.Errorf("%s: %v", sum, errs)
		}
		if objs, _, err := s.List(t.Context(), "", "", 10); err != nil || len(objs) != 0 {
			t.Errorf("%s: left are %v, %v", sum, objs, err)
		}
	}
}

// testCopyAcross copies between buckets, prefixes and wrapped stores of one server without the bytes' passing
// through here.
func testCopyAcross(t *testing.T, m *miniotest.Server) {
	from, to := m.Store(t, m.Bucket(t), "p"), m.Store(t, m.Bucket(t), "q/r")
	body := backendtest.Body(3, 3<<20)
	if _, err := from.Put(t.Context(), "k", body, backend.Cond{}); err != nil {
		t.Fatal(err)
	}
	wrapped := backendtest.NewFaulty(from, 1)
	for key, c := range map[string]backend.Cond{"copied": {}, "copied-if": {Absent: true}} {
		if _, err := to.CopyFrom(t.Context(), key, wrapped, "k", c); err != nil {
			t.Fatal(err)
		}
		if got, _, err := to.Get(t.Context(), key, int64(len(body))); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%s: %d bytes, %v", key, len(got), err)
		}
	}
	if n := wrapped.Counts()["get"] + wrapped.Counts()["read"]; n != 0 {
		t.Errorf("read %d times", n)
	}
	if _, err := to.CopyFrom(t.Context(), "x", m.Store(t, "nobodys-bucket", ""), "k", backend.Cond{}); backend.ClassOf(err) != backend.Permanent ||
		!strings.Contains(fmt.Sprint(err), "nobodys-bucket") {
		t.Errorf("from a missing bucket: %v", err)
	}
}

// testLeftovers leaves an upload behind as a killed process would. This server lists none of them by prefix, and
// removes them after a day by itself: nothing is to be said, and it is no error.
func testLeftovers(t *testing.T, m *miniotest.Server) {
	bucket := m.Bucket(t)
	core := minio.Core{Client: m.Client()}
	if _, err := core.NewMultipartUpload(t.Context(), bucket, "p/k", minio.PutObjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if n := unfinished(t, m, bucket, "p/k"); n != 1 {
		t.Fatalf("%d uploads", n)
	}
	found, err := m.Store(t, bucket, "p").Inspect(t.Context())
	if err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}
}
