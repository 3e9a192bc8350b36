package share

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/minio/minio-go/v7"

	"graindisk/backend/backendtest"
	"graindisk/backend/backendtest/azuritetest"
	"graindisk/backend/backendtest/miniotest"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

const diskBytes = 4 << 20

// place is a bucket or a container, seen by another's client.
type place struct {
	target string                   // in the configuration, but for its name, with %s for the prefix
	list   func() map[string]string // everything in it: name and ETag
	remove func(name string)
}

func bucket(t *testing.T, s *miniotest.Server) place {
	name := s.Bucket(t)
	return place{
		target: fmt.Sprintf("s3: {endpoint: %q, bucket: %s, prefix: %%s, path_style: true, access_key_id: %s, secret_access_key: %s}",
			s.Endpoint, name, miniotest.AccessKey, miniotest.SecretKey),
		list: func() map[string]string {
			all := map[string]string{}
			for o := range s.Client().ListObjects(t.Context(), name, minio.ListObjectsOptions{Recursive: true}) {
				if o.Err != nil {
					t.Fatal(o.Err)
				}
				all[o.Key] = o.ETag
			}
			return all
		},
		remove: func(key string) {
			if err := s.Client().RemoveObject(t.Context(), name, key, minio.RemoveObjectOptions{}); err != nil {
				t.Fatal(err)
			}
		},
	}
}

func box(t *testing.T, s *azuritetest.Server) place {
	name := s.Container(t)
	return place{
		target: fmt.Sprintf("azure: {endpoint: %q, account: %s, container: %s, prefix: %%s, account_key: %q}",
			s.Endpoint, azuritetest.Account, name, azuritetest.AccountKey),
		list: func() map[string]string {
			all := map[string]string{}
			for pager := s.Client(t, name).NewListBlobsFlatPager(&container.ListBlobsFlatOptions{}); pager.More(); {
				page, err := pager.NextPage(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, b := range page.Segment.BlobItems {
					all[*b.Name] = string(*b.Properties.ETag)
				}
			}
			return all
		},
		remove: func(key string) {
			if _, err := s.Client(t, name).NewBlobClient(key).Delete(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
		},
	}
}

// tenant is a pool of its own in the places.
type tenant struct {
	t      *testing.T
	prefix string
	config string
	tier   string
	g      *harness.Gateway
	model  []byte
	seed   uint64
}

func newTenant(t *testing.T, prefix string, places []place) *tenant {
	t.Helper()
	dir := t.TempDir()
	n := &tenant{t: t, prefix: prefix, config: filepath.Join(dir, "gateway.yaml"), tier: filepath.Join(dir, "tier"), model: make([]byte, diskBytes)}
	targets := ""
	for i, p := range places {
		targets += fmt.Sprintf("      - {name: t%d, %s}\n", i, fmt.Sprintf(p.target, prefix))
	}
	text := fmt.Sprintf("data: %q\ntier: {dir: %q, size: 512MiB, ram: 16MiB}\npools:\n  main:\n    max_dirty_age: 1s\n    targets:\n%s    disks: [{name: d, size: %d}]\n",
		filepath.Join(dir, "data"), n.tier, targets, diskBytes)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Must(t, harness.Binary(t), "pool", "create", "main", "--config", n.config)
	n.serve()
	return n
}

func (n *tenant) serve() {
	n.t.Helper()
	n.g = harness.Serve(n.t, "--config", n.config)
}

func (n *tenant) client() *nbdclient.Client {
	n.t.Helper()
	c, err := nbdclient.Dial(n.t.Context(), n.g.URIs[0], nbdclient.Options{})
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// write writes a part of the disk and waits until it is published.
func (n *tenant) write() {
	n.t.Helper()
	n.seed++
	c := n.client()
	defer c.Close()
	off := int64(n.seed*7919%128) * 8192
	copy(n.model[off:], backendtest.Body(n.seed+uint64(len(n.prefix)), 1<<20))
	if err := c.WriteAt(context.Background(), n.model[off:][:1<<20], off, true); err != nil {
		n.t.Fatal(err)
	}
	harness.WaitPublished(n.t, "d", "--config", n.config)
}

func (n *tenant) stop() {
	n.t.Helper()
	if code := n.g.Stop(); code != 0 {
		n.t.Fatalf("prefix %s: exit %d", n.prefix, code)
	}
}

// serveAnew begins again, on the targets alone.
func (n *tenant) serveAnew() {
	n.t.Helper()
	if err := os.RemoveAll(n.tier); err != nil {
		n.t.Fatal(err)
	}
	n.serve()
}

func (n *tenant) check() {
	n.t.Helper()
	c := n.client()
	defer c.Close()
	got := make([]byte, diskBytes)
	if err := c.ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, n.model) {
		n.t.Fatalf("prefix %s: the disk has changed, or %v", n.prefix, err)
	}
}

// of are the objects below a prefix.
func of(all map[string]string, prefix string) map[string]string {
	own := maps.Clone(all)
	maps.DeleteFunc(own, func(key, _ string) bool { return !strings.HasPrefix(key, prefix+"/") })
	return own
}

// untouched fails the test if do changes an object below a prefix.
func untouched(t *testing.T, places []place, prefix string, do func()) {
	t.Helper()
	before := make([]map[string]string, len(places))
	for i, p := range places {
		before[i] = of(p.list(), prefix)
	}
	do()
	for i, p := range places {
		if after := of(p.list(), prefix); !maps.Equal(before[i], after) {
			t.Errorf("target %d: the objects below %s have changed:\n%v\n%v", i, prefix, before[i], after)
		}
	}
}

// TestTwoPoolsShareBuckets has two pools in the same buckets and containers, of which one prefix begins like the
// other. Each is created, written, checked, restarted from its targets alone and in the end wiped out beside the
// other, whose objects stay as they are.
func TestTwoPoolsShareBuckets(t *testing.T) {
	m, a := miniotest.Start(t), azuritetest.Start(t)
	places := []place{bucket(t, m), box(t, a), box(t, a)}
	one := newTenant(t, "disks", places)
	one.write()
	one.stop() // nothing changes by itself any more
	var two *tenant
	untouched(t, places, "disks", func() {
		two = newTenant(t, "disks-2", places) // what is there is another's
		for range 3 {
			two.write()
		}
		two.stop()
		two.serveAnew()
		two.check()
		harness.Must(t, harness.Binary(t), "pool", "check", "main", "--config", two.config)
		two.stop()
	})
	for i, p := range places {
		all := p.list()
		own, others := of(all, "disks"), of(all, "disks-2")
		if len(own) == 0 || len(others) == 0 || len(own)+len(others) != len(all) {
			t.Errorf("target %d: %d objects of the first pool, %d of the second, %d in all", i, len(own), len(others), len(all))
		}
	}
	untouched(t, places, "disks-2", func() {
		one.serveAnew()
		one.check()
		one.write()
		one.stop()
		for _, p := range places { // an operator gives the first pool up
			for key := range of(p.list(), "disks") {
				p.remove(key)
			}
		}
		three := newTenant(t, "disks", places) // the place is empty again
		three.write()
		three.check()
		three.stop()
	})
	two.serveAnew()
	two.check()
	two.write()
	two.stop()
	r := harness.Run(t, "pool", "create", "main", "--config", two.config)
	if r.Code == 0 || !strings.Contains(r.Stderr, "disks-2") {
		t.Errorf("a pool was created over another, or the refusal does not name the place: %d, %s", r.Code, r.Stderr)
	}
}
