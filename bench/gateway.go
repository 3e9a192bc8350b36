package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/pool"
)

const (
	tierBytes    = 10 << 30 // the embedded default, where the disk has room
	readyTimeout = time.Minute
	settleLimit  = 2 * time.Minute
)

// gateway is one data directory and the `gateway serve` that runs on it.
type gateway struct {
	bin, dir string
	uri      string
	proc     *process
}

const gatewayConfig = `data: %[1]s
listen: {nbd: ["unix://%[1]s/nbd.sock"]}
tier: {dir: %[1]s/tier, size: %[2]d}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: %[3]s
    targets:
      - {name: a, local: {dir: %[1]s/targets/a}}
      - {name: b, local: {dir: %[1]s/targets/b}}
      - {name: c, local: {dir: %[1]s/targets/c}}
    disks:
      - {name: d, size: %[4]d}
`

// newGateway makes a pool with an empty disk in dir and serves it.
func newGateway(ctx context.Context, bin, dir string, o options) (*gateway, error) {
	g := &gateway{bin: bin, dir: dir}
	for _, t := range []string{"a", "b", "c"} {
		if err := os.MkdirAll(filepath.Join(dir, "targets", t), 0o700); err != nil {
			return nil, err
		}
	}
	text := fmt.Sprintf(gatewayConfig, dir, int64(tierBytes), o.dirtyAge, o.disk)
	if err := os.WriteFile(g.config(), []byte(text), 0o600); err != nil {
		return nil, err
	}
	if _, err := g.command(ctx, "pool", "create", "main"); err != nil {
		return nil, err
	}
	return g, g.start()
}

func (g *gateway) config() string { return filepath.Join(g.dir, "gateway.yaml") }

// start serves until it prints that it is ready.
func (g *gateway) start() error {
	cmd := exec.Command(g.bin, "serve", "--config", g.config())
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if g.proc, err = startProcess(cmd); err != nil {
		return err
	}
	ready := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		ready <- line
	}()
	select {
	case line := <-ready:
		uris, ok := strings.CutPrefix(strings.TrimSpace(line), "ready ")
		if !ok {
			<-g.proc.done
			return fmt.Errorf("gateway: %s", lastLine(g.proc.stderr.String()))
		}
		g.uri = strings.Fields(uris)[0]
		return nil
	case <-time.After(readyTimeout):
		g.proc.kill()
		return fmt.Errorf("gateway not ready after %v", readyTimeout)
	}
}

// command runs `gateway args...` on the same configuration and returns what it prints.
func (g *gateway) command(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, g.bin, append(args, "--config", g.config())...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("gateway %s: %w: %s", strings.Join(args, " "), err, lastLine(stderr.String()))
	}
	return out, nil
}

// unpublished is what `disk show` says the targets do not hold yet, in bytes.
func (g *gateway) unpublished(ctx context.Context) (int64, error) {
	out, err := g.command(ctx, "disk", "show", "d", "--json")
	if err != nil {
		return 0, err
	}
	var d struct {
		Bytes *int64 `json:"unpublished_bytes"`
	}
	if err := json.Unmarshal(out, &d); err != nil || d.Bytes == nil {
		return 0, fmt.Errorf("disk show printed %q", out)
	}
	return *d.Bytes, nil
}

// requests is how much the targets were asked since the gateway started.
func (g *gateway) requests(ctx context.Context) (int64, error) {
	out, err := g.command(ctx, "pool", "status", "main", "--json")
	if err != nil {
		return 0, err
	}
	var s struct {
		Requests *pool.Requests `json:"requests"`
	}
	if err := json.Unmarshal(out, &s); err != nil || s.Requests == nil {
		return 0, fmt.Errorf("pool status printed %q", out)
	}
	return s.Requests.Total(), nil
}

// settle waits until everything is published.
func (g *gateway) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		n, err := g.unpublished(ctx)
		if err != nil || n == 0 {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%d bytes are still unpublished: %w", n, ctx.Err())
		}
	}
}

// dropTier starts the gateway anew without its tier, and with its targets out of the page cache.
func (g *gateway) dropTier() error {
	if err := g.proc.stop(); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(g.dir, "tier")); err != nil {
		return err
	}
	if err := dropCache(filepath.Join(g.dir, "targets")); err != nil {
		return err
	}
	return g.start()
}

// dropCache asks the kernel to forget the pages of all files below root.
func dropCache(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}
