package azure_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/lease"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"

	"graindisk/backend"
	"graindisk/backend/adaptive"
	"graindisk/backend/azure"
	"graindisk/backend/backendtest"
	"graindisk/backend/backendtest/azuritetest"
)

// TestAzurite runs what needs a real server against one.
func TestAzurite(t *testing.T) {
	a := azuritetest.Start(t)
	t.Run("conforms", func(t *testing.T) {
		backendtest.Run(t, func(t *testing.T) backend.Store { return a.Store(t, a.Container(t), "some/prefix") })
	})
	t.Run("another client reads what ours wrote", func(t *testing.T) { testOtherReads(t, a) })
	t.Run("ours reads what another client wrote", func(t *testing.T) { testOtherWrites(t, a) })
	t.Run("prefixes keep apart", func(t *testing.T) { testPrefixes(t, a) })
	t.Run("strange blobs are left out of lists", func(t *testing.T) { testStrange(t, a) })
	t.Run("lists go on anywhere", func(t *testing.T) { testListAnywhere(t, a) })
	t.Run("wrong credentials", func(t *testing.T) { testCredentials(t, a) })
	t.Run("missing container", func(t *testing.T) { testNoContainer(t, a) })
	t.Run("leased blob", func(t *testing.T) { testLease(t, a) })
	t.Run("leased container", func(t *testing.T) { testLeasedContainer(t, a) })
	t.Run("a signature ends", func(t *testing.T) { testExpiry(t, a) })
	t.Run("settings", func(t *testing.T) { testInspect(t, a) })
}

func testOtherReads(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	store := a.Store(t, name, "p")
	for _, size := range []int{0, 1, 4096, 1<<20 + 7, 9 << 20} {
		want := backendtest.Body(uint64(size), size)
		key := fmt.Sprintf("seg/%d", size)
		etag, err := store.Put(t.Context(), key, want, backend.Cond{Absent: true})
		if err != nil {
			t.Fatal(err)
		}
		out, err := a.Client(t, name).NewBlobClient("p/"+key).DownloadStream(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if _, err := got.ReadFrom(out.Body); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Fatalf("%s: the SDK reads %d bytes, %v", key, got.Len(), err)
		}
		if string(*out.ETag) != etag {
			t.Errorf("%s: our etag %s, the SDK's %s", key, etag, *out.ETag)
		}
		if err := out.Body.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func testOtherWrites(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	store := a.Store(t, name, "p")
	want := backendtest.Body(1, 200_000)
	if _, err := a.Client(t, name).NewBlockBlobClient("p/a/k").Upload(t.Context(), streaming.NopCloser(bytes.NewReader(want)), nil); err != nil {
		t.Fatal(err)
	}
	got, etag, err := store.Get(t.Context(), "a/k", 200_000)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	objs, _, err := store.List(t.Context(), "", "", 10)
	if err != nil || len(objs) != 1 || objs[0].ETag != etag {
		t.Fatalf("list: %v, %v; the blob's etag is %s", objs, err, etag)
	}
	if _, err := store.Put(t.Context(), "a/k", []byte("mine"), backend.Cond{Match: objs[0].ETag}); err != nil {
		t.Fatal("put by the etag of a list:", err)
	}
}

func testPrefixes(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	for _, prefix := range []string{"", "a", "a/b", "ab"} {
		if _, err := a.Store(t, name, prefix).Put(t.Context(), "root", []byte(prefix), backend.Cond{Absent: true}); err != nil {
			t.Fatalf("prefix %q: %v", prefix, err)
		}
	}
	for prefix, want := range map[string][]string{"": {"a/b/root", "a/root", "ab/root", "root"}, "a": {"b/root", "root"}, "a/b": {"root"}, "ab": {"root"}} {
		objs, more, err := a.Store(t, name, prefix).List(t.Context(), "", "", 10)
		if got := keys(objs); err != nil || more || !slices.Equal(got, want) {
			t.Errorf("prefix %q: %v, %v, %v; want %v", prefix, got, more, err, want)
		}
	}
}

func keys(objs []backend.Info) []string {
	var list []string
	for _, o := range objs {
		list = append(list, o.Key)
	}
	return list
}

func testStrange(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	for _, n := range []string{"p/a b", "p/x//y", "p/ok", "p/ümlaut", "p/z/.tmp/x"} {
		if _, err := a.Client(t, name).NewBlockBlobClient(n).Upload(t.Context(), streaming.NopCloser(strings.NewReader("x")), nil); err != nil {
			t.Fatalf("%s: %v", n, err)
		}
	}
	store := a.Store(t, name, "p")
	var got []string
	for after, more := "", true; more; {
		var objs []backend.Info
		var err error
		objs, more, err = store.List(t.Context(), "", after, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(objs) > 0 {
			after = objs[0].Key
		}
		got = append(got, keys(objs)...)
	}
	if !slices.Equal(got, []string{"ok"}) {
		t.Errorf("listed %q", got)
	}
}

// testListAnywhere begins lists at places where no list ended.
func testListAnywhere(t *testing.T, a *azuritetest.Server) {
	store := a.Store(t, a.Container(t), "")
	var all []string
	for i := range 25 {
		key := fmt.Sprintf("seg/%02d", i)
		if _, err := store.Put(t.Context(), key, nil, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
		all = append(all, key)
	}
	for i := range all {
		objs, more, err := store.List(t.Context(), "seg/", all[i]+"-", 4) // "-" sorts behind the key and before the next
		want := all[i+1 : min(i+5, len(all))]
		if got := keys(objs); err != nil || !slices.Equal(got, want) || more != (i+5 < len(all)) {
			t.Fatalf("after %s-: %v, %v, %v", all[i], got, more, err)
		}
	}
}

func testCredentials(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	o := a.Options(name, "")
	o.AccountKey = "c2VjcmV0LW9mLWEtd3JvbmcgYWNjb3VudA=="
	expectAuth(t, o, o.AccountKey)

	o = a.Options(name, "")
	o.AccountKey, o.SAS = "", a.SAS(t, name, sas.ContainerPermissions{Read: true, List: true}, time.Hour)
	secret := signature(t, o.SAS)
	store := expectAuth(t, o, secret)
	if _, _, err := store.List(t.Context(), "", "", 1); err != nil {
		t.Error("list by a SAS that may:", err)
	}
	o.SAS, o.ConnectionString = "", fmt.Sprintf("DefaultEndpointsProtocol=http;AccountName=%s;AccountKey=%s;BlobEndpoint=%s;", azuritetest.Account, azuritetest.AccountKey, a.Endpoint)
	byString, err := azure.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := byString.Put(t.Context(), "k", nil, backend.Cond{}); err != nil {
		t.Error("put by a connection string:", err)
	}
	if errs := store.DeleteBatch(t.Context(), []string{"k"}); len(errs) != 1 || !errors.Is(errs[0], backend.ErrAuth) || strings.Contains(fmt.Sprint(errs), secret) {
		t.Errorf("batch by a SAS that may not: %v", errs)
	}
	o.SAS, o.ConnectionString = a.SAS(t, name, sas.ContainerPermissions{Read: true, List: true, Delete: true}, time.Hour), ""
	bySAS, err := azure.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if errs := bySAS.DeleteBatch(t.Context(), []string{"k", "none"}); errs != nil {
		t.Errorf("batch by a SAS that may: %v", errs)
	}
}

// signature is the secret part of a SAS.
func signature(t *testing.T, query string) string {
	t.Helper()
	q, err := url.ParseQuery(query)
	if err != nil || q.Get("sig") == "" {
		t.Fatalf("no signature in the SAS: %v", err)
	}
	return q.Get("sig")
}

// testExpiry has a signature that has ended, and a new one where it came from: a caller of the adaptive store does
// not notice.
func testExpiry(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	all := sas.ContainerPermissions{Read: true, Write: true, Create: true, Delete: true, List: true}
	o := a.Options(name, "p")
	o.AccountKey, o.SAS = "", a.SAS(t, name, all, -time.Hour)
	expectAuth(t, o, signature(t, o.SAS))
	asked := 0
	o.Renew = func(context.Context) (azure.Credentials, error) {
		asked++
		return azure.Credentials{SAS: a.SAS(t, name, all, time.Hour)}, nil
	}
	inner, err := azure.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	store := adaptive.New(inner, adaptive.Options{})
	if _, err := store.Put(t.Context(), "k", []byte("body"), backend.Cond{Absent: true}); err != nil {
		t.Error("put by a signature that has ended, with a new one at hand:", err)
	}
	if body, _, err := store.Get(t.Context(), "k", 10); err != nil || string(body) != "body" {
		t.Errorf("get: %q, %v", body, err)
	}
	if asked != 1 {
		t.Errorf("a new signature was asked for %d times", asked)
	}
}

// testLeasedContainer works in a container that its owner protects from being deleted.
func testLeasedContainer(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	l, err := lease.NewContainerClient(a.Client(t, name), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.AcquireLease(t.Context(), -1, nil); err != nil {
		t.Fatal(err)
	}
	store := a.Store(t, name, "p")
	etag, err := store.Put(t.Context(), "k", []byte("1"), backend.Cond{Absent: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), "k", []byte("2"), backend.Cond{Match: etag}); err != nil {
		t.Error(err)
	}
	if err := store.Delete(t.Context(), "k"); err != nil {
		t.Error(err)
	}
	if _, err := a.Client(t, name).Delete(t.Context(), nil); err == nil {
		t.Error("the container was deleted in spite of the lease")
	}
	found, err := store.Inspect(t.Context())
	if err != nil || !slices.ContainsFunc(found, func(f backend.Finding) bool { return f.Name == "lease" && !f.Dangerous }) {
		t.Errorf("no word of the lease: %+v, %v", found, err)
	}
}

// testInspect expects nothing but what cannot be seen of a plain account, and that a signature is looked at.
func testInspect(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	o := a.Options(name, "p")
	store, err := azure.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), "k", nil, backend.Cond{}); err != nil {
		t.Fatal(err)
	}
	found, err := store.Inspect(t.Context())
	if err != nil || slices.ContainsFunc(found, func(f backend.Finding) bool { return f.Dangerous }) || found[len(found)-1].Name != "rules of the account" {
		t.Errorf("%+v, %v", found, err)
	}
	o.AccountKey, o.SAS = "", a.SAS(t, name, sas.ContainerPermissions{Read: true, List: true, Write: true}, time.Hour)
	if store, err = azure.Open(o); err != nil {
		t.Fatal(err)
	}
	found, err = store.Inspect(t.Context())
	text := fmt.Sprintf("%+v", found)
	if err != nil || !strings.Contains(text, `lacks "d"`) || !strings.Contains(text, "it ends at ") || strings.Contains(text, signature(t, o.SAS)) {
		t.Errorf("%s, %v", text, err)
	}
}

// expectAuth expects that a put is refused, in words that do not hold the secret.
func expectAuth(t *testing.T, o azure.Options, secret string) *azure.Store {
	t.Helper()
	store, err := azure.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = store.Put(t.Context(), "k", []byte("x"), backend.Cond{})
	if !errors.Is(err, backend.ErrAuth) {
		t.Errorf("put: %v", err)
	}
	if strings.Contains(fmt.Sprintf("%v %+v", err, err), secret) {
		t.Errorf("the error tells the secret: %v", err)
	}
	return store
}

func testNoContainer(t *testing.T, a *azuritetest.Server) {
	store := a.Store(t, "nowhere", "")
	_, err := store.Put(t.Context(), "k", nil, backend.Cond{Absent: true})
	if backend.ClassOf(err) != backend.Permanent || !strings.Contains(err.Error(), `"nowhere" does not exist`) {
		t.Errorf("put: %v", err)
	}
	for op, do := range map[string]func() error{
		"get":    func() error { _, _, err := store.Get(t.Context(), "k", 1); return err },
		"read":   func() error { return store.ReadAt(t.Context(), "k", make([]byte, 1), 0) },
		"stat":   func() error { _, err := store.Stat(t.Context(), "k"); return err },
		"delete": func() error { return store.Delete(t.Context(), "k") },
		"list":   func() error { _, _, err := store.List(t.Context(), "", "", 1); return err },
		"batch":  func() error { return errors.Join(store.DeleteBatch(t.Context(), []string{"k"})...) },
	} {
		if err := do(); backend.ClassOf(err) != backend.Permanent {
			t.Errorf("%s: %v", op, err)
		}
	}
}

func testLease(t *testing.T, a *azuritetest.Server) {
	name := a.Container(t)
	store := a.Store(t, name, "")
	if _, err := store.Put(t.Context(), "k", []byte("x"), backend.Cond{}); err != nil {
		t.Fatal(err)
	}
	l, err := lease.NewBlobClient(a.Client(t, name).NewBlobClient("k"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.AcquireLease(t.Context(), 60, nil); err != nil {
		t.Fatal(err)
	}
	_, err = store.Put(t.Context(), "k", []byte("y"), backend.Cond{})
	if backend.ClassOf(err) != backend.Permanent || !strings.Contains(err.Error(), "Lease") {
		t.Errorf("put under another's lease: %v", err)
	}
	for _, key := range []string{"a", "b"} { // of a batch it hinders its own key alone
		if _, err := store.Put(t.Context(), key, nil, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
	}
	errs := store.DeleteBatch(t.Context(), []string{"a", "k", "none", "b"})
	if len(errs) != 4 || errs[0] != nil || backend.ClassOf(errs[1]) != backend.Permanent || errs[2] != nil || errs[3] != nil {
		t.Errorf("batch: %v", errs)
	}
	if objs, _, err := store.List(t.Context(), "", "", 10); err != nil || len(objs) != 1 || objs[0].Key != "k" {
		t.Errorf("left are %v, %v", objs, err)
	}
}
