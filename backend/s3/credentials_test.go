package s3

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"graindisk/backend"
)

// fakeSTS gives every role keys named for it, and remembers who asked for which role.
type fakeSTS struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string // "KEY>ROLE"
	form  string   // the last
}

var credentialOf = regexp.MustCompile(`Credential=([^/]+)/`)

func newFakeSTS(t *testing.T) *fakeSTS {
	f := &fakeSTS{}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		role := r.Form.Get("RoleArn")
		role = role[strings.LastIndexByte(role, '/')+1:]
		f.mu.Lock()
		f.asked, f.form = append(f.asked, credentialOf.FindStringSubmatch(r.Header.Get("Authorization"))[1]+">"+role), r.Form.Encode()
		f.mu.Unlock()
		w.Header().Set("Content-Type", "text/xml")
		fmt.Fprintf(w, `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>`+
			`<AccessKeyId>key-%[1]s</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>token-%[1]s</SessionToken>`+
			`<Expiration>%[2]s</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`,
			role, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	t.Cleanup(f.Close)
	return f
}

// asker tells who signed the last request, and with which token.
func asker(t *testing.T, s *fakeBucket) string {
	t.Helper()
	return credentialOf.FindStringSubmatch(s.last.Header.Get("Authorization"))[1] + " " + s.last.Header.Get("X-Amz-Security-Token")
}

// fakeBucket says yes to everything and keeps the last request.
type fakeBucket struct {
	*httptest.Server
	last *http.Request
}

func newFakeBucket(t *testing.T) *fakeBucket {
	f := &fakeBucket{}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		f.last = r
		w.Header().Set("ETag", `"e"`)
	}))
	t.Cleanup(f.Close)
	return f
}

func TestRoleIsAssumedByWhoeverTheCredentialsAre(t *testing.T) {
	sts, bucket := newFakeSTS(t), newFakeBucket(t)
	s, err := Open(t.Context(), Options{
		Bucket: "b", Endpoint: bucket.URL, PathStyle: true, AccessKey: "base", SecretKey: "s",
		RoleARN: "arn:aws:iam::1:role/writer", ExternalID: "from-us", STSEndpoint: sts.URL,
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := s.Put(t.Context(), "k", nil, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
		if got := asker(t, bucket); got != "key-writer token-writer" {
			t.Errorf("the bucket is asked by %s", got)
		}
	}
	if got := fmt.Sprint(sts.asked); got != "[base>writer]" {
		t.Errorf("roles asked for: %s", got)
	}
	for _, want := range []string{"ExternalId=from-us", "RoleSessionName=graindisk"} {
		if !strings.Contains(sts.form, want) {
			t.Errorf("no %s in %s", want, sts.form)
		}
	}
}

func TestProfileMayChainRoles(t *testing.T) {
	sts, bucket := newFakeSTS(t), newFakeBucket(t)
	t.Setenv("AWS_ENDPOINT_URL_STS", sts.URL)
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(`[profile base]
aws_access_key_id = base
aws_secret_access_key = s
[profile first]
role_arn = arn:aws:iam::1:role/first
source_profile = base
[profile second]
role_arn = arn:aws:iam::2:role/second
source_profile = first
region = eu-west-1
`), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), Options{
		Bucket: "b", Endpoint: bucket.URL, PathStyle: true, Profile: "second", ConfigFile: path, CredentialsFile: path,
		Region: "eu-west-1", RoleARN: "arn:aws:iam::3:role/third", STSEndpoint: sts.URL,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "k", nil, backend.Cond{}); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(sts.asked); got != "[base>first key-first>second key-second>third]" {
		t.Errorf("roles asked for: %s", got)
	}
	if got := asker(t, bucket); got != "key-third token-third" {
		t.Errorf("the bucket is asked by %s", got)
	}
}

func TestSTSThatIsAwayIsNotARefusal(t *testing.T) {
	for status, want := range map[int]backend.Class{503: backend.Transient, 500: backend.Transient, 403: backend.Auth} {
		sts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) }))
		s, err := Open(t.Context(), Options{
			Bucket: "b", Endpoint: "http://127.0.0.1:1", PathStyle: true, AccessKey: "base", SecretKey: "s",
			RoleARN: "arn:aws:iam::1:role/writer", STSEndpoint: sts.URL,
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.Put(t.Context(), "k", nil, backend.Cond{Absent: true}); backend.ClassOf(err) != want {
			t.Errorf("%d of the STS gives %v, want %v", status, err, want)
		}
		sts.Close()
		if _, err = s.Put(t.Context(), "k", nil, backend.Cond{Absent: true}); backend.ClassOf(err) != backend.Transient {
			t.Errorf("an STS that is gone gives %v", err)
		}
	}
}

func TestRotatedKeysAreAskedForAgain(t *testing.T) {
	r := rotated(func(context.Context) (Keys, error) { return Keys{"a", "s", "t"}, nil })
	got, err := r.Retrieve(t.Context())
	if err != nil || got.AccessKeyID != "a" || got.SecretAccessKey != "s" || got.SessionToken != "t" {
		t.Fatalf("got %v, %v", got, err)
	}
	if left := time.Until(got.Expires); !got.CanExpire || left <= 0 || left > keysTTL {
		t.Errorf("they expire %v, in %v", got.CanExpire, left)
	}
	gone := errors.New("the file is gone")
	r = func(context.Context) (Keys, error) { return Keys{}, gone }
	if _, err := r.Retrieve(t.Context()); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

func TestCertificateAuthorities(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Header().Set("ETag", `"e"`) }))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshakes that fail
	server.StartTLS()
	defer server.Close()
	path := filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ca   string
		want backend.Class
	}{{path, 0}, {"", backend.Permanent}} {
		s, err := Open(t.Context(), Options{Bucket: "b", Endpoint: server.URL, PathStyle: true, CAFile: c.ca, AccessKey: "a", SecretKey: "s"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Put(t.Context(), "k", []byte("x"), backend.Cond{}); backend.ClassOf(err) != c.want {
			t.Errorf("with CA file %q: %v", c.ca, err)
		}
	}
	if _, err := Open(t.Context(), Options{Bucket: "b", Endpoint: server.URL, CAFile: "/does/not/exist", AccessKey: "a", SecretKey: "s"}); err == nil {
		t.Error("a missing CA file opened")
	}
}
