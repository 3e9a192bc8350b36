package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/pool"
	"graindisk/vdisk"
)

// fakeGateway has one pool and one disk.
type fakeGateway struct{ disks map[string]pool.DiskInfo }

func (*fakeGateway) Version() string { return "v1.2.3" }
func (g *fakeGateway) Disks() (ds []pool.DiskInfo) {
	for _, d := range g.disks {
		ds = append(ds, d)
	}
	return ds
}
func (g *fakeGateway) Disk(name string) (pool.DiskInfo, error) {
	d, ok := g.disks[name]
	if !ok {
		return d, fmt.Errorf("disk %s: %w", name, pool.ErrNoDisk)
	}
	return d, nil
}
func (g *fakeGateway) CreateDisk(_ context.Context, n NewDisk) (pool.DiskInfo, error) {
	switch _, taken := g.disks[n.Name]; {
	case n.SizeBytes <= 0:
		return pool.DiskInfo{}, fmt.Errorf("%w: size %d", ErrBadRequest, n.SizeBytes)
	case taken:
		return pool.DiskInfo{}, fmt.Errorf("create disk %s: %w", n.Name, pool.ErrExists)
	case n.Name == "broken":
		return pool.DiskInfo{}, errors.New("out of luck")
	}
	g.disks[n.Name] = pool.DiskInfo{Name: n.Name, SizeBytes: n.SizeBytes}
	return g.disks[n.Name], nil
}
func (*fakeGateway) Pools(context.Context) []pool.Status { return []pool.Status{{Name: "main"}} }
func (*fakeGateway) Pool(_ context.Context, name string) (pool.Status, error) {
	if name != "main" {
		return pool.Status{}, fmt.Errorf("pool %s: %w", name, ErrNoPool)
	}
	return pool.Status{Name: "main", Epoch: 7}, nil
}

func (g *fakeGateway) ReleasePool(_ context.Context, name string) (pool.Status, error) {
	switch s, err := g.Pool(context.Background(), name); {
	case err != nil:
		return s, err
	case len(g.disks) > 1:
		return s, fmt.Errorf("pool %s: %w", name, vdisk.ErrFenced)
	default:
		s.PublishedCut = 5
		return s, nil
	}
}

func start(t *testing.T) (*Client, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "up 1\n") })
		done <- Serve(ctx, l, Handler(&fakeGateway{map[string]pool.DiskInfo{"vm1": {Name: "vm1", Epoch: 7}}}, metrics), slog.New(slog.DiscardHandler))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return NewClient(socket), socket
}

func TestTheClientGetsWhatTheGatewaySays(t *testing.T) {
	c, _ := start(t)
	ctx := context.Background()
	if d, err := c.Disk(ctx, "vm1"); err != nil || d.Epoch != 7 {
		t.Errorf("disk: %+v %v", d, err)
	}
	if p, err := c.ReleasePool(ctx, "main"); err != nil || p.PublishedCut != 5 {
		t.Errorf("release: %+v %v", p, err)
	}
	if d, err := c.CreateDisk(ctx, NewDisk{Name: "vm2", SizeBytes: 1 << 20}); err != nil || d.SizeBytes != 1<<20 {
		t.Errorf("create: %+v %v", d, err)
	}
	if ds, err := c.Disks(ctx); err != nil || len(ds) != 2 {
		t.Errorf("disks: %+v %v", ds, err)
	}
	if p, err := c.Pool(ctx, "main"); err != nil || p.Epoch != 7 {
		t.Errorf("pool: %+v %v", p, err)
	}
	if ps, err := c.Pools(ctx); err != nil || len(ps) != 1 {
		t.Errorf("pools: %+v %v", ps, err)
	}
}

func TestFailuresKeepTheirMeaningOverTheWire(t *testing.T) {
	c, _ := start(t)
	ctx := context.Background()
	for _, f := range []struct {
		what string
		err  error
		want error
	}{
		{"a disk that is not there", second(c.Disk(ctx, "no/such?disk")), pool.ErrNoDisk},
		{"a pool that is not there", second(c.Pool(ctx, "x")), ErrNoPool},
		{"a pool to release that is not there", second(c.ReleasePool(ctx, "x")), ErrNoPool},
		{"a pool to release that another has taken over", releaseFenced(ctx, c), vdisk.ErrFenced},
		{"a name that is taken", second(c.CreateDisk(ctx, NewDisk{Name: "vm1", SizeBytes: 1})), pool.ErrExists},
		{"a request that makes no sense", second(c.CreateDisk(ctx, NewDisk{Name: "vm3"})), ErrBadRequest},
	} {
		if !errors.Is(f.err, f.want) {
			t.Errorf("%s: %v, want %v", f.what, f.err, f.want)
		}
	}
	if _, err := c.CreateDisk(ctx, NewDisk{Name: "broken", SizeBytes: 1}); err == nil || err.Error() != "out of luck" {
		t.Errorf("a failure without a name: %v", err)
	}
	if _, err := NewClient("/nowhere/admin.sock").Disks(ctx); err == nil || !strings.Contains(err.Error(), "/nowhere/admin.sock") || !strings.Contains(err.Error(), "start it with") {
		t.Errorf("no gateway: %v", err)
	}
}

func releaseFenced(ctx context.Context, c *Client) error {
	if _, err := c.CreateDisk(ctx, NewDisk{Name: "vm2", SizeBytes: 1 << 20}); err != nil {
		return err
	}
	return second(c.ReleasePool(ctx, "main"))
}

func second[T any](_ T, err error) error { return err }

func TestBadRequestsAreRefused(t *testing.T) {
	c, _ := start(t)
	for _, f := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/v1/disks", `{"name":"x","size_bytes":1,"colour":"red"}`, http.StatusBadRequest},
		{"POST", "/v1/disks", `{`, http.StatusBadRequest},
		{"POST", "/v1/disks", `{"name":"` + strings.Repeat("x", bodyBytesMax) + `"}`, http.StatusBadRequest},
		{"PUT", "/v1/disks/vm1", "", http.StatusMethodNotAllowed},
		{"DELETE", "/v1/disks/vm1", `{"sure":true}`, http.StatusBadRequest},
		{"POST", "/v1/disks/vm1/resize", `{`, http.StatusBadRequest},
		{"GET", "/v1/pools/main/release", "", http.StatusMethodNotAllowed},
		{"GET", "/v2/disks", "", http.StatusNotFound},
		{"GET", "/metrics", "", http.StatusOK},
		{"GET", "/v1/version", "", http.StatusOK},
	} {
		req, err := http.NewRequest(f.method, "http://gateway"+f.path, strings.NewReader(f.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != f.want {
			t.Errorf("%s %s: %s, want %d", f.method, f.path, resp.Status, f.want)
		}
	}
}
