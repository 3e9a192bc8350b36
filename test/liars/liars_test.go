// Package liars puts proxies in front of a real S3 server that lie about conditional writes, each in one way, and
// expects the gateway to refuse them.
package liars

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// proxy passes everything on to a server but what lie answers itself. lie returns false to pass a request on.
func proxy(t *testing.T, s *miniotest.Server, lie func(http.ResponseWriter, *http.Request) bool) string {
	t.Helper()
	to, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	pass := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Host = r.In.Host // it is signed
	}}
	p := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !lie(w, r) {
			pass.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(p.Close)
	return p.URL
}

// ignoring is a lie: puts with a header go through whether its condition holds or not.
func ignoring(t *testing.T, s *miniotest.Server, header string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut || r.Header.Get(header) == "" {
			return false
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Header.Get("Content-Encoding") != "" {
			t.Errorf("body of %s: %v, encoded as %q", r.URL, err, r.Header.Get("Content-Encoding"))
		}
		bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		info, err := s.Client().PutObject(r.Context(), bucket, key, bytes.NewReader(body), int64(len(body)), minio.PutObjectOptions{})
		if err != nil {
			t.Errorf("put %s: %v", r.URL, err)
		}
		w.Header().Set("ETag", `"`+info.ETag+`"`)
		return true
	}
}

// dropping is a lie: puts for which which is true are answered, and nothing else.
func dropping(which func(*http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
	var n atomic.Int64
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut || !which(r) {
			return false
		}
		_, _ = io.Copy(io.Discard, r.Body) // a client that went away is no matter
		w.Header().Set("ETag", fmt.Sprintf(`"%032x"`, n.Add(1)))
		return true
	}
}

// TestStoresThatLieAreRefused has `pool check` and `pool create` meet one liar among three targets. Both name it,
// what is wrong and what to do, and no root is made anywhere.
func TestStoresThatLieAreRefused(t *testing.T) {
	s := miniotest.Start(t)
	conditional := func(r *http.Request) bool {
		return r.Header.Get("If-Match") != "" || r.Header.Get("If-None-Match") != ""
	}
	for name, c := range map[string]struct {
		lie   func(http.ResponseWriter, *http.Request) bool
		check string // "" for a proxy that is honest
	}{
		"honest":                          {func(http.ResponseWriter, *http.Request) bool { return false }, ""},
		"takes If-Match for true":         {ignoring(t, s, "If-Match"), "put if match"},
		"takes If-None-Match for true":    {ignoring(t, s, "If-None-Match"), "put if absent"},
		"drops what it acknowledges":      {dropping(func(*http.Request) bool { return true }), "read after write"},
		"drops what has a condition":      {dropping(conditional), "put if absent"},
		"drops what replaces a known one": {dropping(func(r *http.Request) bool { return r.Header.Get("If-Match") != "" }), "put if match"},
	} {
		t.Run(name, func(t *testing.T) {
			target := func(endpoint, bucket string) string {
				return fmt.Sprintf("s3: {endpoint: %q, bucket: %s, path_style: true, access_key_id: %s, secret_access_key: %s}",
					endpoint, bucket, miniotest.AccessKey, miniotest.SecretKey)
			}
			buckets := []string{s.Bucket(t), s.Bucket(t), s.Bucket(t)}
			dir := t.TempDir()
			file := filepath.Join(dir, "gateway.yaml")
			text := fmt.Sprintf("data: %q\ntier: {size: 1GiB}\npools:\n  main:\n    stripe: {data: 2, parity: 1}\n    targets:\n      - {name: good, %s}\n      - {name: liar, %s}\n      - {name: fine, %s}\n",
				filepath.Join(dir, "data"), target(s.Endpoint, buckets[0]), target(proxy(t, s, c.lie), buckets[1]), target(s.Endpoint, buckets[2]))
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			check, create := harness.Run(t, "pool", "check", "main", "--json", "--config", file), harness.Run(t, "pool", "create", "main", "--config", file)
			var reports []struct {
				Target string
				Report struct {
					Checks []struct{ Name, Result, Text, Advice string }
				}
			}
			dec := json.NewDecoder(strings.NewReader(check.Stdout))
			if err := dec.Decode(&reports); err != nil || len(reports) != 3 {
				t.Fatalf("pool check: exit %d: %s%s", check.Code, check.Stdout, check.Stderr)
			}
			found := false
			for _, r := range reports {
				for _, k := range r.Report.Checks {
					if k.Result == "missing" && r.Target != "liar" {
						t.Errorf("target %s: %+v", r.Target, k)
					}
					found = found || k.Result == "missing" && k.Name == c.check && strings.Contains(k.Advice, "use ")
				}
			}
			if c.check == "" {
				if check.Code != 0 || create.Code != 0 {
					t.Errorf("pool check: exit %d, pool create: exit %d: %s%s", check.Code, create.Code, create.Stdout, create.Stderr)
				}
				return
			}
			if !found || check.Code != 1 {
				t.Errorf("pool check: exit %d: %s%s", check.Code, check.Stdout, check.Stderr)
			}
			if e := create.Stderr; create.Code != 1 || !strings.Contains(e, "target liar") || !strings.Contains(e, c.check+": ") || !strings.Contains(e, "use ") || strings.Count(e, "\n") > 1+strings.Count(e, "level=") {
				t.Errorf("pool create: exit %d: %s", create.Code, e)
			}
			for _, b := range buckets {
				for o := range s.Client().ListObjects(t.Context(), b, minio.ListObjectsOptions{Recursive: true}) {
					t.Errorf("bucket %s holds %s, %v", b, o.Key, o.Err)
				}
			}
		})
	}
}
