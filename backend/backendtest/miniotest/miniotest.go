// Package miniotest runs a real MinIO server for a test, on 127.0.0.1 and in a temporary folder. The
// server's binary is built once by test/minio/build.sh (`make minio`); a test that needs it fails without.
package miniotest

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"graindisk/backend/backendtest/servertest"
	"graindisk/backend/s3"
)

// Version is MinIO's, as pinned in test/minio/go.mod.
const Version = "v0.0.0-20260212201848-7aac2a2c5b7c"

// The keys of the server's only user.
const (
	AccessKey = "graindisk"
	SecretKey = "graindisk-secret"
)

// Server is one MinIO. Its methods must be called by one goroutine at a time, Store, Client and
// Endpoint excepted.
type Server struct {
	servertest.Process
	Endpoint string // "http://127.0.0.1:port"; the same for the server's whole life

	data    string // directory
	buckets atomic.Int64
	client  *minio.Client
}

// Start starts a server that stops when the test ends. If the test fails, the end of the server's
// log is in the test's. env is added to its environment: "MINIO_DOMAIN=…".
func Start(t testing.TB, env ...string) *Server {
	t.Helper()
	binary, dir := findBinary(t), t.TempDir()
	s := &Server{data: filepath.Join(dir, "data"), Process: servertest.Process{Name: "MinIO", Ready: "/minio/health/ready", Want: http.StatusOK}}
	s.Command = func(address string) *exec.Cmd {
		cmd := exec.Command(binary, "server", "--quiet",
			"--address", address, "--certs-dir", filepath.Join(dir, "certs"), s.data)
		cmd.Env = []string{
			"HOME=" + dir, "PATH=" + os.Getenv("PATH"),
			"MINIO_ROOT_USER=" + AccessKey, "MINIO_ROOT_PASSWORD=" + SecretKey, "MINIO_BROWSER=off", "MINIO_UPDATE=off",
		}
		cmd.Env = append(cmd.Env, env...)
		return cmd
	}
	s.Run(t)
	s.Endpoint = "http://" + s.Address
	s.client = newClient(t, s.Address)
	return s
}

// findBinary is the path of the server's binary: GRAINDISK_MINIO, or where build.sh puts it.
func findBinary(t testing.TB) string {
	t.Helper()
	path := os.Getenv("GRAINDISK_MINIO")
	if path == "" {
		cache, err := os.UserCacheDir() // XDG_CACHE_HOME or ~/.cache
		if err != nil {
			t.Fatal(err)
		}
		path = filepath.Join(cache, "graindisk", "minio-"+Version)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no MinIO server for this test (%v): run `make minio`", err)
	}
	return path
}

func newClient(t testing.TB, address string) *minio.Client {
	t.Helper()
	c, err := minio.New(address, &minio.Options{Creds: credentials.NewStaticV4(AccessKey, SecretKey, "")})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Client is the server's client by another hand: minio-go.
func (s *Server) Client() *minio.Client { return s.client }

// Bucket makes a new, empty bucket and returns its name.
func (s *Server) Bucket(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("bucket-%d", s.buckets.Add(1))
	if err := s.client.MakeBucket(t.Context(), name, minio.MakeBucketOptions{}); err != nil {
		t.Fatalf("make bucket %s: %v", name, err)
	}
	return name
}

// Wipe removes all objects of a bucket, behind the back of whoever stored them.
func (s *Server) Wipe(t testing.TB, bucket string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel() // ends the listing, too
	objects := s.client.ListObjects(ctx, bucket, minio.ListObjectsOptions{Recursive: true})
	for o := range objects {
		if o.Err != nil {
			t.Fatalf("list bucket %s: %v", bucket, o.Err)
		}
		if err := s.client.RemoveObject(ctx, bucket, o.Key, minio.RemoveObjectOptions{}); err != nil {
			t.Fatalf("remove %s of bucket %s: %v", o.Key, bucket, err)
		}
	}
}

// Lose ends the server and deletes all that it has stored, buckets too. Start then starts an empty one.
func (s *Server) Lose(t testing.TB) {
	t.Helper()
	s.Kill(t)
	if err := os.RemoveAll(s.data); err != nil {
		t.Fatal(err)
	}
}

// Options are those of the s3 driver for a bucket of this server.
func (s *Server) Options(bucket, prefix string) s3.Options {
	return s3.Options{
		Bucket: bucket, Prefix: prefix, Endpoint: s.Endpoint, PathStyle: true, AccessKey: AccessKey, SecretKey: SecretKey,
	}
}

// Store opens a bucket of this server.
func (s *Server) Store(t testing.TB, bucket, prefix string) *s3.Store {
	t.Helper()
	store, err := s3.Open(t.Context(), s.Options(bucket, prefix))
	if err != nil {
		t.Fatal(err)
	}
	return store
}
