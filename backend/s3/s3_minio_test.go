package s3_test

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"

	"graindisk/backend"
	"graindisk/backend/backendtest"
	"graindisk/backend/backendtest/miniotest"
	"graindisk/backend/s3"
)

// TestMinIO runs what needs a real server against one.
func TestMinIO(t *testing.T) {
	m := miniotest.Start(t, "MINIO_DOMAIN="+domain, "MINIO_KMS_SECRET_KEY="+kms)
	t.Run("conforms", func(t *testing.T) {
		backendtest.Run(t, func(t *testing.T) backend.Store { return m.Store(t, m.Bucket(t), "some/prefix") })
	})
	t.Run("another client reads what ours wrote", func(t *testing.T) { testOtherReads(t, m) })
	t.Run("ours reads what another client wrote", func(t *testing.T) { testOtherWrites(t, m) })
	t.Run("prefixes keep apart", func(t *testing.T) { testPrefixes(t, m) })
	t.Run("strange objects are left out of lists", func(t *testing.T) { testStrange(t, m) })
	t.Run("wrong credentials", func(t *testing.T) { testCredentials(t, m) })
	t.Run("parts", func(t *testing.T) { testParts(t, m) })
	t.Run("conditions of parts", func(t *testing.T) { testPartsConditions(t, m) })
	t.Run("parts that fail", func(t *testing.T) { testPartsFail(t, m) })
	t.Run("storage class and encryption", func(t *testing.T) { testObjectOptions(t, m) })
	t.Run("checksums", func(t *testing.T) { testChecksums(t, m) })
	t.Run("copies across", func(t *testing.T) { testCopyAcross(t, m) })
	t.Run("leftovers", func(t *testing.T) { testLeftovers(t, m) })
	t.Run("virtual hosts", func(t *testing.T) { testVirtualHost(t, m) })
	t.Run("session token", func(t *testing.T) { testSessionToken(t, m) })
	t.Run("assumed role", func(t *testing.T) { testRole(t, m) })
	t.Run("keys that are rotated", func(t *testing.T) { testRotation(t, m) })
	t.Run("profiles", func(t *testing.T) { testProfiles(t, m) })
	t.Run("missing bucket", func(t *testing.T) { testNoBucket(t, m) })
}

func testOtherReads(t *testing.T, m *miniotest.Server) {
	bucket := m.Bucket(t)
	store := m.Store(t, bucket, "p")
	for _, size := range []int{0, 1, 4096, 1<<20 + 7, 9 << 20} {
		want := backendtest.Body(uint64(size), size)
		key := fmt.Sprintf("seg/%d", size)
		etag, err := store.Put(t.Context(), key, want, backend.Cond{Absent: true})
		if err != nil {
			t.Fatal(err)
		}
		o, err := m.Client().GetObject(t.Context(), bucket, "p/"+key, minio.GetObjectOptions{Checksum: true})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(o)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: minio-go reads %d bytes, %v", key, len(got), err)
		}
		info, err := o.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if strings.Trim(etag, `"`) != info.ETag {
			t.Errorf("%s: our etag %s, minio-go's %s", key, etag, info.ETag)
		}
		if info.ChecksumCRC32C == "" {
			t.Errorf("%s: the store kept no CRC32C", key)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func testOtherWrites(t *testing.T, m *miniotest.Server) {
	bucket := m.Bucket(t)
	store := m.Store(t, bucket, "p")
	want := backendtest.Body(1, 200_000)
	_, err := m.Client().PutObject(t.Context(), bucket, "p/a/k", bytes.NewReader(want), int64(len(want)), minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got, etag, err := store.Get(t.Context(), "a/k", 200_000)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if _, err := store.Put(t.Context(), "a/k", []byte("mine"), backend.Cond{Match: etag}); err != nil {
		t.Fatal(err)
	}
}

func testPrefixes(t *testing.T, m *miniotest.Server) {
	bucket := m.Bucket(t)
	for key, prefix := range map[string]string{"k0": "", "k1": "p", "k2": "p2", "k3": "p/q"} {
		if _, err := m.Store(t, bucket, prefix).Put(t.Context(), key, []byte(key), backend.Cond{Absent: true}); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, want := range map[string]string{"": "k0 p/k1 p/q/k3 p2/k2", "p": "k1 q/k3", "p2": "k2", "p/q": "k3", "other": ""} {
		found, _, err := m.Store(t, bucket, prefix).List(t.Context(), "", "", 10)
		if err != nil {
			t.Fatal(err)
		}
		var keys []string
		for _, info := range found {
			keys = append(keys, info.Key)
		}
		if got := strings.Join(keys, " "); got != want {
			t.Errorf("below %s: %q, want %q", prefix, got, want)
		}
	}
}

func testStrange(t *testing.T, m *miniotest.Server) {
	bucket := m.Bucket(t)
	store := m.Store(t, bucket, "p")
	for _, name := range []string{"p/a b", "p/a+b", "p/ü", "p/c/"} { // all sort before the key
		if _, err := m.Client().PutObject(t.Context(), bucket, name, strings.NewReader(""), 0, minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := store.Put(t.Context(), "z", nil, backend.Cond{}); err != nil {
		t.Fatal(err)
	}
	found, _, err := store.List(t.Context(), "", "", 1) // pages of one: most hold no key at all
	if err != nil || len(found) != 1 || found[0].Key != "z" {
		t.Errorf("found %v, %v", found, err)
	}
}

// everyCall makes each of the calls once and returns their errors by operation.
func everyCall(t *testing.T, s backend.Store) map[string]error {
	ctx, errs := t.Context(), map[string]error{}
	_, errs["put"] = s.Put(ctx, "k", []byte("x"), backend.Cond{})
	_, errs["put if absent"] = s.Put(ctx, "k", []byte("x"), backend.Cond{Absent: true})
	_, _, errs["get"] = s.Get(ctx, "k", 10)
	errs["read"] = s.ReadAt(ctx, "k", make([]byte, 1), 0)
	_, errs["stat"] = s.Stat(ctx, "k")
	errs["delete"] = s.Delete(ctx, "k")
	_, _, errs["list"] = s.List(ctx, "", "", 10)
	return errs
}

func testCredentials(t *testing.T, m *miniotest.Server) {
	bucket := m.Bucket(t)
	for name, change := range map[string]func(*s3.Options){
		"unknown key":  func(o *s3.Options) { o.AccessKey = "nobody" },
		"wrong secret": func(o *s3.Options) { o.SecretKey = "wrong-wrong" },
	} {
		o := m.Options(bucket, "")
		change(&o)
		s, err := s3.Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		for op, err := range everyCall(t, s) {
			if backend.ClassOf(err) != backend.Auth {
				t.Errorf("%s: %s gives %v", name, op, err)
			}
			if strings.Contains(fmt.Sprint(err), o.SecretKey) {
				t.Errorf("%s: %s tells the secret key", name, op)
			}
		}
	}
}

func testNoBucket(t *testing.T, m *miniotest.Server) {
	for op, err := range everyCall(t, m.Store(t, "nobodys-bucket", "p")) {
		if backend.ClassOf(err) != backend.Permanent || !strings.Contains(fmt.Sprint(err), `bucket "nobodys-bucket" does not exist`) {
			t.Errorf("%s gives %v", op, err)
		}
	}
}
