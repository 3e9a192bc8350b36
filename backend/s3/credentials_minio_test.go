package s3_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/minio/minio-go/v7/pkg/credentials"

	"graindisk/backend"
	"graindisk/backend/adaptive"
	"graindisk/backend/backendtest/miniotest"
	"graindisk/backend/s3"
)

// domain is what the server under test takes for its own in a request's host.
const domain = "store.test"

// testVirtualHost speaks to BUCKET.store.test, a name that only the test resolves.
func testVirtualHost(t *testing.T, m *miniotest.Server) {
	o := m.Options(m.Bucket(t), "p")
	_, port, err := net.SplitHostPort(m.Address)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var hosts []string
	o.PathStyle, o.Endpoint = false, "http://"+domain+":"+port
	o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		mu.Lock()
		hosts = append(hosts, address)
		mu.Unlock()
		return new(net.Dialer).DialContext(ctx, network, m.Address)
	}
	works(t, o)
	if want := o.Bucket + "." + domain + ":" + port; !slices.Contains(hosts, want) {
		t.Errorf("connected to %v, not to %s", hosts, want)
	}
	for _, style := range []bool{true, false} { // a missing bucket is told in both styles
		o.Bucket, o.PathStyle = "nobodys-bucket", style
		s, err := s3.Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Stat(t.Context(), "k"); backend.ClassOf(err) != backend.Permanent {
			t.Errorf("path style %v: stat in a missing bucket gives %v", style, err)
		}
	}
}

// works opens a store and makes each call.
func works(t *testing.T, o s3.Options) {
	t.Helper()
	s, err := s3.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for op, err := range everyCall(t, s) {
		if err != nil && (op != "put if absent" || backend.ClassOf(err) != backend.Precondition) {
			t.Errorf("%s: %v", op, err)
		}
	}
}

// session asks the server's own STS for temporary keys, by another hand.
func session(t *testing.T, m *miniotest.Server) s3.Keys {
	t.Helper()
	c, err := credentials.NewSTSAssumeRole(m.Endpoint, credentials.STSAssumeRoleOptions{
		AccessKey: miniotest.AccessKey, SecretKey: miniotest.SecretKey, DurationSeconds: 3600,
	})
	if err != nil {
		t.Fatal(err)
	}
	v, err := c.GetWithContext(nil)
	if err != nil {
		t.Fatal(err)
	}
	if v.SessionToken == "" || v.AccessKeyID == miniotest.AccessKey {
		t.Fatal("no session")
	}
	return s3.Keys{AccessKey: v.AccessKeyID, SecretKey: v.SecretAccessKey, SessionToken: v.SessionToken}
}

func testSessionToken(t *testing.T, m *miniotest.Server) {
	keys, o := session(t, m), m.Options(m.Bucket(t), "")
	o.AccessKey, o.SecretKey, o.SessionToken = keys.AccessKey, keys.SecretKey, keys.SessionToken
	works(t, o)

	o.SessionToken = "" // temporary keys are worth nothing without it
	s, err := s3.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "k", nil, backend.Cond{}); backend.ClassOf(err) != backend.Auth {
		t.Errorf("without the token: %v", err)
	}

	o.AccessKey, o.SecretKey = "", "" // and from where they are rotated
	asked := 0
	o.Keys = func(context.Context) (s3.Keys, error) { asked++; return keys, nil }
	works(t, o)
	if asked != 1 {
		t.Errorf("asked for the keys %d times", asked)
	}
}

func testRole(t *testing.T, m *miniotest.Server) {
	o := m.Options(m.Bucket(t), "")
	o.RoleARN, o.STSEndpoint, o.SessionName = "arn:aws:iam::123456789012:role/writer", m.Endpoint, "disk-host"
	works(t, o)

	o.SecretKey = "wrong-wrong"
	s, err := s3.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Put(t.Context(), "k", nil, backend.Cond{})
	if backend.ClassOf(err) != backend.Auth || strings.Contains(fmt.Sprint(err), o.SecretKey) {
		t.Errorf("the role refused: %v", err)
	}
}

// testRotation replaces keys that the server refuses in the file that they come from, under 20 callers.
func testRotation(t *testing.T, m *miniotest.Server) {
	file := filepath.Join(t.TempDir(), "credentials")
	write := func(keys s3.Keys) {
		text := fmt.Sprintf("[rotated]\naws_access_key_id = %s\naws_secret_access_key = %s\naws_session_token = %s\n", keys.AccessKey, keys.SecretKey, keys.SessionToken)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fresh, stale := session(t, m), session(t, m)
	stale.SessionToken = fresh.SessionToken // as good as a session that is over: refused
	o := m.Options(m.Bucket(t), "")
	o.AccessKey, o.SecretKey, o.Attempts = "", "", 1
	o.Profile, o.ConfigFile, o.CredentialsFile = "rotated", file, file
	write(stale)
	inner, err := s3.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := inner.Put(t.Context(), "k", nil, backend.Cond{}); backend.ClassOf(err) != backend.Auth {
		t.Fatalf("with the stale keys: %v", err)
	}
	write(fresh)
	store := adaptive.New(inner, adaptive.Options{})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			key := fmt.Sprint("k", i)
			if _, err := store.Put(t.Context(), key, []byte("x"), backend.Cond{Absent: true}); err != nil {
				t.Error(err)
			}
			if err := store.ReadAt(t.Context(), key, make([]byte, 1), 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	put := store.Health().Ops["put"]
	if put.Retries == 0 || put.Retries != put.Errors[backend.Auth.String()] || put.Requests != 20+put.Retries {
		t.Errorf("%+v", put)
	}
	for _, want := range []string{"keys that are good", "and the same again"} {
		if changed, err := inner.Refresh(t.Context()); changed || err != nil {
			t.Errorf("%s: %v, %v", want, changed, err)
		}
	}
}

// testProfiles goes through files like ~/.aws/config and ~/.aws/credentials: keys, a role whose source is
// another profile, and a process that prints keys.
func testProfiles(t *testing.T, m *miniotest.Server) {
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_ENDPOINT_URL_STS", m.Endpoint)
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"} {
		t.Setenv(name, "")
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keys := session(t, m)
	process := write("process", fmt.Sprintf("#!/bin/sh\necho '{\"Version\": 1, \"AccessKeyId\": %q, \"SecretAccessKey\": %q, \"SessionToken\": %q}'\n",
		keys.AccessKey, keys.SecretKey, keys.SessionToken))
	o := m.Options(m.Bucket(t), "")
	o.AccessKey, o.SecretKey = "", ""
	o.ConfigFile = write("config", `[profile plain]
region = eu-west-1
[profile first]
role_arn = arn:aws:iam::123456789012:role/first
source_profile = plain
region = eu-west-1
[profile process]
credential_process = `+process+`
[profile nothing]
region = eu-west-1
`)
	o.CredentialsFile = write("credentials", fmt.Sprintf("[plain]\naws_access_key_id = %s\naws_secret_access_key = %s\n", miniotest.AccessKey, miniotest.SecretKey))
	for _, profile := range []string{"plain", "first", "process"} {
		t.Run(profile, func(t *testing.T) {
			o := o
			o.Profile = profile
			works(t, o)
		})
	}
	o.Profile = "missing"
	if _, err := s3.Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a missing profile: %v", err)
	}
	o.Profile = "nothing"
	s, err := s3.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), "k"); backend.ClassOf(err) != backend.Auth {
		t.Errorf("a profile without keys: %v", err)
	}
}
