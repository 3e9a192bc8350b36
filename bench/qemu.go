package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// qemu is one qemu-nbd on the raw file.
type qemu struct {
	name string
	uri  string
	proc *process
}

// qemuModes are the baselines: with the page cache, and without.
var qemuModes = []struct {
	name  string
	flags []string
}{
	{"qemu-nbd none", []string{"--cache=none", "--aio=native"}},
	{"qemu-nbd writeback", []string{"--cache=writeback"}},
}

// qemuFlags are the flags both modes share.
var qemuFlags = []string{"--persistent", "--shared=4", "--format=raw", "--export-name=d"}

// startQemus fills the raw file and serves it in both modes. Only one of them is used at a time.
func startQemus(ctx context.Context, dir string, size int64) ([]*qemu, error) {
	raw := filepath.Join(dir, "raw")
	if err := fillFile(ctx, raw, size); err != nil {
		return nil, err
	}
	var qs []*qemu
	for i, m := range qemuModes {
		sock := filepath.Join(dir, fmt.Sprintf("qemu%d.sock", i))
		args := append(append([]string{"--socket=" + sock}, qemuFlags...), m.flags...)
		p, err := startProcess(exec.Command("qemu-nbd", append(args, raw)...))
		if err != nil {
			return qs, err
		}
		qs = append(qs, &qemu{m.name, "nbd+unix:///d?socket=" + sock, p})
		if err := p.waitSocket(ctx, sock); err != nil {
			return qs, err
		}
	}
	return qs, nil
}

// waitSocket waits until somebody accepts connections on a unix socket.
func (p *process) waitSocket(ctx context.Context, sock string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		c, err := net.Dial("unix", sock)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended: %s", p.cmd.Path, lastLine(p.stderr.String()))
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// fillFile makes a file of size bytes of noise, synced.
func fillFile(ctx context.Context, path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := noise()
	for off := int64(0); off < size; off += int64(len(buf)) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// noise is 1 MiB that does not compress.
func noise() []byte {
	buf := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(buf)
	return buf
}
