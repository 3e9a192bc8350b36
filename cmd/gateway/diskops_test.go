package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/pool"
)

// running is a gateway in this process.
type running struct {
	t      *testing.T
	config string
	stop   context.CancelFunc
	done   chan int
	errs   *bytes.Buffer // readable once it is done
}

// startGateway returns once it serves.
func startGateway(t *testing.T, config string) *running {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	r := &running{t: t, config: config, stop: stop, done: make(chan int, 1), errs: new(bytes.Buffer)}
	out, in := io.Pipe()
	go func() {
		code := run(ctx, []string{"serve", "--config", config}, in, r.errs)
		in.Close()
		r.done <- code
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready ") {
		t.Fatalf("%q %v: exit %d, %s", line, err, <-r.done, r.errs)
	}
	t.Cleanup(stop)
	return r
}

// end stops it and returns what it said.
func (r *running) end() string {
	r.t.Helper()
	r.stop()
	if code := <-r.done; code != exitDone {
		r.t.Errorf("exit %d: %s", code, r.errs)
	}
	return r.errs.String()
}

// do runs a command and expects an exit code and a word in what it says.
func (r *running) do(want int, word string, args ...string) string {
	r.t.Helper()
	code, stdout, stderr := gatewayRun(r.t, append(args, "--config", r.config)...)
	if code != want || !strings.Contains(stdout+stderr, word) {
		r.t.Errorf("%v: exit %d, want %d with %q: %s%s", args, code, want, word, stdout, stderr)
	}
	return stdout
}

// metrics asks the admin socket.
func (r *running) metrics(dir string) string {
	r.t.Helper()
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(dir, "admin.sock"))
	}}}
	defer c.CloseIdleConnections()
	resp, err := c.Get("http://gateway/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func TestDisksComeAndGo(t *testing.T) {
	dir := t.TempDir()
	text := fmt.Sprintf("data: %s\ntier: {size: 512MiB, ram: 32MiB}\npools:\n  main:\n    stripe: {data: 1, parity: 0}\n    targets: [{name: t, local: {dir: %s/t}}]\n"+
		"    disks: [{name: vm1, size: 1MiB}, {name: vm2, size: 1MiB, allow: [\"uid=%d\"]}, {name: vm3, size: 1MiB}]\n", dir, dir, os.Getuid())
	config := writeFile(t, text)
	if err := os.Mkdir(filepath.Join(dir, "t"), 0o700); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := gatewayRun(t, "pool", "create", "main", "--config", config); code != exitDone {
		t.Fatal(stderr)
	}
	g := startGateway(t, config)
	c, err := nbdclient.Dial(t.Context(), "nbd+unix:///vm1?socket="+filepath.Join(dir, "nbd.sock"), nbdclient.Options{})
	if err != nil {
		t.Fatal(err)
	}
	g.do(exitFailed, "in use by 1 connections", "disk", "delete", "vm1")
	g.do(exitDone, "deleted", "disk", "delete", "vm1", "--force")
	if err := c.ReadAt(t.Context(), make([]byte, 512), 0); err == nil {
		t.Error("a client of the deleted disk goes on reading")
	}
	c.Close()
	g.do(exitNoSuch, "no such disk", "disk", "delete", "vm1")
	g.do(exitDone, "vm1", "disk", "list", "--deleted")
	g.do(exitUsage, "access rules", "disk", "rename", "vm2", "vm9")
	g.do(exitDone, "was vm3", "disk", "rename", "vm3", "vm8")
	g.do(exitFailed, "exists", "disk", "rename", "vm8", "vm2")
	g.do(exitUsage, "", "disk", "rename", "vm8", "NO!")
	g.do(exitDone, "2MiB", "disk", "resize", "vm8", "2MiB")
	g.do(exitFailed, "--shrink", "disk", "resize", "vm8", "1MiB")
	g.do(exitDone, "1MiB", "disk", "resize", "vm8", "1MiB", "--shrink")
	if m := g.metrics(dir); !strings.Contains(m, `gateway_pool_space_bytes{kind="doomed",pool="main"} 0`) || !strings.Contains(m, `gateway_pool_reclaimed_bytes_total{pool="main"} 0`) {
		t.Errorf("metrics:\n%s", m)
	}
	g.do(exitDone, "0 too low", "pool", "fsck", "main", "--orphans")
	g.do(exitNoSuch, "no such pool", "pool", "fsck", "x")
	g.do(exitUsage, "--orphans", "pool", "fsck", "main", "--reclaim")
	g.end()

	g = startGateway(t, config)
	g.do(exitNoSuch, "no such disk", "disk", "show", "vm1") // deleted, not made again
	g.do(exitNoSuch, "no such disk", "disk", "show", "vm3") // renamed
	g.do(exitDone, "is back", "disk", "undelete", "vm1")
	g.do(exitNoSuch, "disk list --deleted", "disk", "undelete", "vm3")
	g.do(exitDone, "deleted", "disk", "delete", "vm8", "--purge")
	g.do(exitNoSuch, "disk list --deleted", "disk", "undelete", "vm8")
	var ds []pool.DiskInfo
	if err := json.Unmarshal([]byte(g.do(exitDone, "", "disk", "list", "--json")), &ds); err != nil || len(ds) != 2 {
		t.Errorf("%+v %v", ds, err)
	}
	var d pool.DiskInfo
	if err := json.Unmarshal([]byte(g.do(exitDone, "", "disk", "rename", "vm1", "vm5", "--json")), &d); err != nil || d.Name != "vm5" {
		t.Errorf("%+v %v", d, err)
	}
	if said := g.end(); strings.Count(said, "not made again") != 2 {
		t.Errorf("it said: %s", said)
	}
}
