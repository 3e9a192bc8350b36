package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/test/harness"
)

const (
	fullDisk  = 64 << 20
	fullLimit = 2 * time.Minute
)

// TestStatusTellsOfAFullTier takes the space away below a gateway that is written to. It must say so where
// a person and where a program looks, and go on once there is space again.
func TestStatusTellsOfAFullTier(t *testing.T) {
	p := newPlace(t)
	text, err := os.ReadFile(p.config) // no cut meanwhile: it would give slots back, to be written over
	p.must(err)
	p.write("gateway.yaml", strings.Replace(string(text), "  main:\n", "  main:\n    max_dirty_age: 10m\n", 1))
	mountTier(p, 700<<20)
	g := harness.Serve(t, "--config", p.create().config)
	harness.Must(t, harness.Binary(t), "disk", "create", "vm", fmt.Sprint(fullDisk), "--config", p.config)
	c, err := nbdclient.Dial(t.Context(), "nbd+unix:///vm?socket="+p.path("data/nbd.sock"), nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	if text, metrics := harness.Must(t, harness.Binary(t), "pool", "status", "--config", p.config), p.metrics(); strings.Contains(text, "full") ||
		!strings.Contains(metrics, `gateway_tier_refuses_writes{pool="main",reason="full"} 0`) {
		t.Errorf("before: %s", text)
	}
	var st syscall.Statfs_t
	p.must(syscall.Statfs(p.path("tier"), &st))
	p.resizeTier(int64(st.Blocks-st.Bfree+256) * st.Bsize)
	ctx, stop := context.WithCancel(t.Context())
	written := make(chan error, 1)
	go func() { written <- writeUntil(ctx, c) }()

	var s struct {
		Log struct {
			Waits, Error string
			Seconds      float64 `json:"waits_seconds"`
		}
	}
	for deadline := time.Now().Add(fullLimit); s.Log.Waits == ""; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the tier's file system is full, and the status does not say so")
		}
		p.must(json.Unmarshal([]byte(harness.Must(t, harness.Binary(t), "pool", "status", "main", "--json", "--config", p.config)), &s))
	}
	if s.Log.Waits != "full" || s.Log.Error == "" {
		t.Errorf("status: %+v", s)
	}
	r := harness.Run(t, "pool", "status", "--check", "--config", p.config)
	for _, want := range []string{"the tier's file system is full: writes wait", p.path("tier"), "free some space"} {
		if !strings.Contains(r.Stdout, want) || !strings.Contains(r.Stderr, want) {
			t.Errorf("%q is not in both outputs:\n%s%s", want, r.Stdout, r.Stderr)
		}
	}
	if r.Code != 1 {
		t.Errorf("pool status --check: exit %d", r.Code)
	}
	if m := p.metrics(); !strings.Contains(m, `gateway_tier_refuses_writes{pool="main",reason="full"} 1`) {
		t.Errorf("no metric of it: %s", m)
	}

	p.resizeTier(700 << 20)
	for deadline := time.Now().Add(fullLimit); s.Log.Waits != ""; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("there is space again, and the status does not say so")
		}
		s.Log.Waits = ""
		p.must(json.Unmarshal([]byte(harness.Must(t, harness.Binary(t), "pool", "status", "main", "--json", "--config", p.config)), &s))
	}
	stop()
	if err := <-written; err != nil {
		t.Errorf("a write: %v", err)
	}
	if code := g.Stop(); code != 0 {
		t.Errorf("exit %d", code)
	}
}

// writeUntil writes the disk over and over until ctx ends; none of the writes may fail.
func writeUntil(ctx context.Context, c *nbdclient.Client) error {
	p := make([]byte, 1<<20)
	for off := int64(0); ctx.Err() == nil; off = (off + int64(len(p))) % fullDisk {
		if err := c.WriteAt(context.WithoutCancel(ctx), p, off, false); err != nil {
			return err
		}
	}
	return nil
}

// resizeTier gives the file system that mountTier made another size.
func (p *place) resizeTier(bytes int64) {
	p.t.Helper()
	p.must(syscall.Mount("tmpfs", p.path("tier"), "tmpfs", syscall.MS_REMOUNT, fmt.Sprintf("size=%d", bytes)))
}

// metrics are those of the gateway that runs on the configuration.
func (p *place) metrics() string {
	p.t.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.path("data/admin.sock"))
	}}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://gateway/metrics")
	p.must(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	p.must(err)
	return string(text)
}
