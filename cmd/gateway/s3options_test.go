package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"graindisk/backend"
	"graindisk/backend/s3"
	"graindisk/config"
)

// TestS3CredentialsComeFromWhereTheConfigurationSays also replaces a credentials file in use.
func TestS3CredentialsComeFromWhereTheConfigurationSays(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	write := func(id string) {
		text := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = s\naws_session_token = t\n", id)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	o, err := s3Options(&config.S3{CredentialsFile: file, MultipartAbove: 7 * config.MiB, StorageClass: "STANDARD_IA", Checksum: "md5"})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"first", "second"} {
		write(id)
		if got, err := o.Keys(t.Context()); err != nil || got != (s3.Keys{AccessKey: id, SecretKey: "s", SessionToken: "t"}) {
			t.Errorf("the keys of %s are %v, %v", id, got.AccessKey, err)
		}
	}
	if o.AccessKey != "" || o.Profile != "" || o.MultipartAbove != 7<<20 || o.StorageClass != "STANDARD_IA" || o.Checksum != s3.MD5 {
		t.Error("other options than those configured")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Keys(t.Context()); err == nil {
		t.Error("keys from a file that is gone")
	}
	if _, err := s3Options(&config.S3{CredentialsFile: file}); err == nil {
		t.Error("opened with a file that is not there")
	}

	for name, c := range map[string]struct {
		from config.S3
		good func(o s3.Options) bool
	}{
		"keys":    {config.S3{AccessKeyID: "a", SecretAccessKey: "b", SessionToken: "c"}, func(o s3.Options) bool { return o.AccessKey == "a" && o.SecretKey == "b" && o.SessionToken == "c" }},
		"profile": {config.S3{Profile: "p"}, func(o s3.Options) bool { return o.Profile == "p" && o.ConfigFile == "" }},
		"config file": {config.S3{ConfigFile: "/c", CredentialsFile: "/k", Profile: "p"}, func(o s3.Options) bool {
			return o.Profile == "p" && o.ConfigFile == "/c" && o.CredentialsFile == "/k" && o.Keys == nil
		}},
		"its default": {config.S3{ConfigFile: "/c"}, func(o s3.Options) bool { return o.Profile == "default" }},
		"nothing":     {config.S3{}, func(o s3.Options) bool { return o.AccessKey == "" && o.Keys == nil && o.Profile == "" }},
		"role": {config.S3{RoleARN: "arn:r", ExternalID: "e", RoleSessionName: "n", STSEndpoint: "http://s"}, func(o s3.Options) bool {
			return o.RoleARN == "arn:r" && o.ExternalID == "e" && o.SessionName == "n" && o.STSEndpoint == "http://s"
		}},
		"encryption":    {config.S3{SSE: "aws:kms", KMSKeyID: "k"}, func(o s3.Options) bool { return o.SSE == "aws:kms" && o.KMSKey == "k" }},
		"virtual hosts": {config.S3{Endpoint: "http://h", Region: "r"}, func(o s3.Options) bool { return !o.PathStyle && o.Endpoint == "http://h" && o.Region == "r" }},
	} {
		o, err := s3Options(&c.from)
		if err != nil || !c.good(o) {
			t.Errorf("%s: not as configured, %v", name, err)
		}
	}
}

// TestS3TargetHasOneRetryLoop counts what reaches a busy store from a target as the pool has it, and rotates the keys
// in the file that the configuration names.
func TestS3TargetHasOneRetryLoop(t *testing.T) {
	var requests atomic.Int64
	var busy atomic.Bool
	takes := "first"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		requests.Add(1)
		switch {
		case busy.Load():
			w.WriteHeader(http.StatusServiceUnavailable)
		case !strings.Contains(r.Header.Get("Authorization"), "Credential="+takes+"/"):
			w.WriteHeader(http.StatusForbidden)
		default:
			w.Header().Set("ETag", `"e"`)
		}
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "credentials")
	write := func(id string) {
		text := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = s\n", id)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	log := slog.New(slog.DiscardHandler)
	target := config.Target{Name: "bucket", S3: &config.S3{Bucket: "b", Endpoint: server.URL, PathStyle: true, CredentialsFile: file}}
	s, err := openStore(t.Context(), target, false, 1, log)
	if err != nil {
		t.Fatal(err)
	}
	store := adapt(s, target, log)
	put := func() error {
		_, err := store.Put(t.Context(), "k", []byte("x"), backend.Cond{})
		return err
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}
	takes = "second"
	write("second")
	if err := put(); err != nil {
		t.Error("after the rotation:", err)
	}
	busy.Store(true)
	if err := put(); backend.ClassOf(err) != backend.Throttled {
		t.Errorf("of a busy store: %v", err)
	}
	if got, n := store.Health().Ops["put"].Requests, requests.Load(); n != 1+2+3 || got != uint64(n) {
		t.Errorf("%d requests, %d are counted", n, got)
	}
}
