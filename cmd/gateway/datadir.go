package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/writeback"
)

// dataDir is the data directory, locked for this process. Its file "lock" also says when a gateway served
// from here last, as lines of text:
//
//	alive BOOT SINCE WALL     id of the boot; ns since that, and ns since 1970, at the last sign of life
//	log UUID                  each log that was served then and was not stopped
//	crc XXXXXXXX              CRC32C of all before this line; what follows is left from before
//
// It is written once a second and never synced: it need only outlive the process. It tells that a pool
// cannot have gone to another owner between two processes (servedJustNow); who cannot read it waits longer.
type dataDir struct {
	lock *os.File
	last []byte // the lock's content when it was taken
}

// A gateway that gave a sign of life so long ago counts as one that went on running: an owner that pauses for
// less than half of the 30 s in which its pool's beat moves may go on without asking for the root, and
// opening takes some of that. The root is looked for during rootLook all the same.
const (
	aliveWithin = 10 * time.Second
	aliveEvery  = time.Second
	rootLook    = 500 * time.Millisecond
)

// lockData makes the data directory and locks it for this process. The lock goes with the process.
// While another has it, it tries again for as long as wait.
func lockData(ctx context.Context, dir string, wait time.Duration) (*dataDir, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	until := time.Now().Add(wait)
	for err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil && ctx.Err() == nil && time.Now().Before(until); {
		time.Sleep(lockRetry)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("data directory %s is in use by another gateway (%s is locked): %w", dir, path, errBusy)
	}
	d := &dataDir{lock: f, last: make([]byte, 4096)}
	n, _ := f.ReadAt(d.last, 0) // what cannot be read is no sign of life
	d.last = d.last[:n]
	return d, nil
}

// lockRetry is short: guests wait while a lock is handed over.
const lockRetry = 5 * time.Millisecond

var errBusy = errors.New("stop it first, or use another --data")

func (d *dataDir) unlock() { d.lock.Close() }

// servedJustNow tells whether a gateway served that log from here until a moment ago.
func (d *dataDir) servedJustNow(id writeback.UUID) bool {
	return d.served(id, now())
}

// moment is the time by the clock of the boot, which counts while the machine sleeps, and by that of the wall.
type moment struct {
	boot        string
	since, wall time.Duration
}

func now() moment {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it, none is like another
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // cannot fail with these arguments
	return moment{strings.TrimSpace(string(boot)), time.Duration(ts.Nano()), time.Duration(time.Now().UnixNano())}
}

func (d *dataDir) served(id writeback.UUID, at moment) bool {
	signed, rest, ok := strings.Cut(string(d.last), "crc ")
	if !ok || len(rest) < 9 || rest[:9] != checksum(signed) {
		return false
	}
	var m moment
	lines := strings.Split(signed, "\n")
	if n, err := fmt.Sscanf(lines[0], "alive %s %d %d", &m.boot, &m.since, &m.wall); n != 3 || err != nil {
		return false
	}
	recent := func(then, now time.Duration) bool { return then <= now && now-then <= aliveWithin }
	if at.boot == "" || m.boot != at.boot || !recent(m.since, at.since) || !recent(m.wall, at.wall) {
		return false
	}
	for _, l := range lines[1:] {
		if l == "log "+hex.EncodeToString(id[:]) {
			return true
		}
	}
	return false
}

// checksum is what follows "crc " in the lock.
func checksum(signed string) string {
	return fmt.Sprintf("%08x\n", crc32.Checksum([]byte(signed), crc32.MakeTable(crc32.Castagnoli)))
}

// signature is the lock's content.
func signature(at moment, logs []writeback.UUID) string {
	var b strings.Builder
	fmt.Fprintf(&b, "alive %s %d %d\n", at.boot, at.since, at.wall)
	for _, id := range logs {
		fmt.Fprintf(&b, "log %x\n", id[:])
	}
	return b.String() + "crc " + checksum(b.String())
}

// signLife writes signs of life until ctx ends. logs are those that are served at the moment.
func (d *dataDir) signLife(ctx context.Context, logs func() []writeback.UUID, log *slog.Logger) {
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	failing := false
	for {
		_, err := d.lock.WriteAt([]byte(signature(now(), logs())), 0)
		if err != nil && !failing {
			log.Warn("no sign of life written; a restart waits longer for targets that do not answer", "err", err)
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// takeBack takes the sign of life back, before pools are given to other owners.
func (d *dataDir) takeBack(log *slog.Logger) {
	if err := d.lock.Truncate(0); err != nil {
		log.Warn("sign of life not taken back", "err", err)
	}
}
