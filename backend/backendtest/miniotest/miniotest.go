// Package miniotest runs a real MinIO server for a test, on 127.0.0.1 and in a temporary folder. The
// server's binary is built once by test/minio/build.sh (`make minio`); a test that needs it fails without.
package miniotest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"graindisk/backend/s3"
)

// Version is MinIO's, as pinned in test/minio/go.mod.
const Version = "v0.0.0-20260212201848-7aac2a2c5b7c"

// The keys of the server's only user.
const (
	AccessKey = "graindisk"
	SecretKey = "graindisk-secret"
)

const (
	startTimeout = 60 * time.Second // usually 1 s
	stopTimeout  = 20 * time.Second // then it is killed
	portTries    = 5                // a port found free may be taken before the server has it
)

// Server is one MinIO. Its methods must be called by one goroutine at a time, Store, Client and
// Endpoint excepted.
type Server struct {
	Endpoint string // "http://127.0.0.1:port"; the same for the server's whole life

	binary, dir, address string
	buckets              atomic.Int64
	client               *minio.Client

	cmd    *exec.Cmd
	exited chan struct{} // closed once cmd has ended
	log    *logBuffer
}

// Start starts a server that stops when the test ends. If the test fails, the end of the server's
// log is in the test's.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{binary: findBinary(t), dir: t.TempDir(), log: new(logBuffer)}
	t.Cleanup(func() {
		s.Stop(t)
		if t.Failed() {
			t.Logf("end of the MinIO log:\n%s", s.log)
		}
	})
	for range portTries {
		s.address = freeAddress(t)
		s.Endpoint = "http://" + s.address
		if s.launch(t) {
			s.client = newClient(t, s.address)
			return s
		}
	}
	t.Fatalf("MinIO did not start:\n%s", s.log)
	return nil
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

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func newClient(t testing.TB, address string) *minio.Client {
	t.Helper()
	c, err := minio.New(address, &minio.Options{Creds: credentials.NewStaticV4(AccessKey, SecretKey, "")})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// launch starts the process and waits until it is ready. It returns false if the process has ended instead.
func (s *Server) launch(t testing.TB) bool {
	t.Helper()
	s.cmd = exec.Command(s.binary, "server", "--quiet",
		"--address", s.address, "--certs-dir", filepath.Join(s.dir, "certs"), filepath.Join(s.dir, "data"))
	s.cmd.Env = []string{
		"HOME=" + s.dir, "PATH=" + os.Getenv("PATH"),
		"MINIO_ROOT_USER=" + AccessKey, "MINIO_ROOT_PASSWORD=" + SecretKey, "MINIO_BROWSER=off", "MINIO_UPDATE=off",
	}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // should the test die without its clean-up
	s.exited = make(chan struct{})
	started := make(chan error)
	go func(cmd *exec.Cmd, exited chan struct{}) {
		// Pdeathsig means the death of the thread that started it, so this one stays.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // why it ended is in its log
		}
	}(s.cmd, s.exited)
	if err := <-started; err != nil {
		t.Fatalf("start %s: %v", s.binary, err)
	}
	return s.awaitReady(t)
}

func (s *Server) awaitReady(t testing.TB) bool {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second}
	deadline := time.After(startTimeout)
	for {
		if resp, err := client.Get(s.Endpoint + "/minio/health/ready"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return true
			}
		}
		select {
		case <-s.exited:
			return false
		case <-deadline:
			t.Fatalf("MinIO was not ready after %v:\n%s", startTimeout, s.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends the server, as an outage would: what it stored stays. It may be started again.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil || s.cmd.Process == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended
	_ = s.cmd.Process.Signal(syscall.SIGCONT) // it may be paused
	select {
	case <-s.exited:
	case <-time.After(stopTimeout):
		t.Logf("MinIO did not stop within %v, killing it", stopTimeout)
		_ = s.cmd.Process.Kill()
		<-s.exited
	}
	s.cmd = nil
}

// Start starts a stopped server again, with the same address and data.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if s.cmd != nil {
		t.Fatal("MinIO is running")
	}
	if !s.launch(t) {
		t.Fatalf("MinIO did not start again at %s:\n%s", s.address, s.log)
	}
}

// Pause stops the server from answering, as a network that swallows packets would.
func (s *Server) Pause(t testing.TB) { s.signal(t, syscall.SIGSTOP) }

// Resume undoes Pause.
func (s *Server) Resume(t testing.TB) { s.signal(t, syscall.SIGCONT) }

func (s *Server) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
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

// logBuffer keeps the last 64 KiB or so of what the server says.
type logBuffer struct {
	mu  sync.Mutex
	buf []byte
}

const logBytesMax = 64 << 10

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if len(l.buf) > 2*logBytesMax {
		l.buf = bytes.Clone(l.buf[len(l.buf)-logBytesMax:])
	}
	return len(p), nil
}

// String is what is kept.
func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.buf)
}
