package loss

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"

	"graindisk/backend/backendtest/miniotest"
)

// target is a place for shards that can be emptied, and filled again with what it held.
type target interface {
	yaml(name string) string    // its entry in the configuration
	empty(t *testing.T)         // keeps what it held aside
	restore(t *testing.T)       // adds what it held before to what it holds now
	objects(t *testing.T) int64 // how many it holds
}

// directory is a local target.
type directory struct{ dir, kept string }

func newDirectory(t *testing.T) *directory {
	d := &directory{dir: filepath.Join(t.TempDir(), "target"), kept: filepath.Join(t.TempDir(), "kept")}
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *directory) yaml(name string) string {
	return fmt.Sprintf("{name: %s, local: {dir: %q}}", name, d.dir)
}

// empty leaves the directory itself: a disk that was exchanged for a new one.
func (d *directory) empty(t *testing.T) {
	t.Helper()
	if err := os.Rename(d.dir, d.kept); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
}

func (d *directory) restore(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(d.kept, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := d.dir + strings.TrimPrefix(path, d.kept)
		if e.IsDir() {
			return os.MkdirAll(to, 0o700)
		}
		if _, err := os.Lstat(to); err == nil {
			return nil // the lock, which every opening makes
		}
		return os.Rename(path, to)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (d *directory) objects(t *testing.T) (n int64) {
	t.Helper()
	err := filepath.WalkDir(d.dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == ".tmp" {
			return fs.SkipDir
		}
		if err == nil && !e.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// bucket is a bucket of a MinIO server of its own; a second one keeps what it held.
type bucket struct {
	server     *miniotest.Server
	name, kept string
}

func newBucket(t *testing.T) *bucket {
	s := miniotest.Start(t)
	return &bucket{s, s.Bucket(t), s.Bucket(t)}
}

func (b *bucket) yaml(name string) string {
	return fmt.Sprintf("{name: %s, s3: {endpoint: %q, bucket: %s, path_style: true, access_key_id: %s, secret_access_key: %s}}",
		name, b.server.Endpoint, b.name, miniotest.AccessKey, miniotest.SecretKey)
}

func (b *bucket) empty(t *testing.T) {
	t.Helper()
	b.copyAll(t, b.name, b.kept)
	b.server.Wipe(t, b.name)
}

func (b *bucket) restore(t *testing.T) {
	t.Helper()
	b.copyAll(t, b.kept, b.name)
}

func (b *bucket) copyAll(t *testing.T, from, to string) {
	t.Helper()
	for _, key := range b.keys(t, from) {
		_, err := b.server.Client().CopyObject(t.Context(),
			minio.CopyDestOptions{Bucket: to, Object: key}, minio.CopySrcOptions{Bucket: from, Object: key})
		if err != nil {
			t.Fatalf("copy %s from bucket %s to %s: %v", key, from, to, err)
		}
	}
}

func (b *bucket) keys(t *testing.T, of string) (keys []string) {
	t.Helper()
	for o := range b.server.Client().ListObjects(t.Context(), of, minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatalf("list bucket %s: %v", of, o.Err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

func (b *bucket) objects(t *testing.T) int64 {
	t.Helper()
	return int64(len(b.keys(t, b.name)))
}
