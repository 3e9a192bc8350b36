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
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"graindisk/writeback"
)

// dataDir is the data directory, locked for this process. Its file "lock" also says when a gateway served
// from here last, as lines of text:
//
//	alive BOOT SINCE WALL     id of the boot; ns since that, and ns since 1970, at the last sign of life
//	log UUID                  each log that was served then and was not stopped
//	tenure UUID EPOCH FILE    the epoch in which it holds its pool, and the device and inode of this very file
//	crc XXXXXXXX              CRC32C of all before this line; what follows is left from before
//
// It is written once a second and never synced: it need only outlive the process. It tells that a pool
// cannot have gone to another owner between two processes (servedJustNow), and that an owner has ended for good, since who
// has the lock of the same file in the same boot has outlived it (hadTenure); who cannot read it waits longer.
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
	d := &dataDir{lock: f, last: make([]byte, 64<<10)}
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
	m, lines, ok := d.lastSign()
	if !ok {
		return false
	}
	recent := func(then, now time.Duration) bool { return then <= now && now-then <= aliveWithin }
	if at.boot == "" || m.boot != at.boot || !recent(m.since, at.since) || !recent(m.wall, at.wall) {
		return false
	}
	return slices.Contains(lines, "log "+hex.EncodeToString(id[:]))
}

// hadTenure tells whether the process that held a pool in that epoch by that log was a gateway on this data directory, in
// this boot: then it has ended, as its lock is ours. It implements pool.Options.Gone.
func (d *dataDir) hadTenure(epoch uint64, log string) bool {
	u, err := uuid.Parse(log)
	m, lines, ok := d.lastSign()
	return err == nil && ok && m.boot != "" && m.boot == now().boot &&
		slices.Contains(lines, tenure{writeback.UUID(u), epoch}.line(d.file()))
}

// lastSign is the last sign of life of whoever had the lock before, in lines.
func (d *dataDir) lastSign() (m moment, lines []string, ok bool) {
	signed, rest, ok := strings.Cut(string(d.last), "crc ")
	if !ok || len(rest) < 9 || rest[:9] != checksum(signed) {
		return m, nil, false
	}
	lines = strings.Split(signed, "\n")
	n, err := fmt.Sscanf(lines[0], "alive %s %d %d", &m.boot, &m.since, &m.wall)
	return m, lines[1:], n == 3 && err == nil
}

// file is the device and the inode of the lock; a copy of it elsewhere has others.
func (d *dataDir) file() string {
	var st unix.Stat_t
	if unix.Fstat(int(d.lock.Fd()), &st) != nil {
		return "unknown" // and nothing is like it
	}
	return fmt.Sprintf("%x:%x", st.Dev, st.Ino)
}

// tenure is an epoch in which a process holds a pool.
type tenure struct {
	log   writeback.UUID
	epoch uint64 // 0 while the process has claimed none itself
}

func (t tenure) line(file string) string {
	return fmt.Sprintf("tenure %x %d %s", t.log[:], t.epoch, file)
}

// checksum is what follows "crc " in the lock.
func checksum(signed string) string {
	return fmt.Sprintf("%08x\n", crc32.Checksum([]byte(signed), crc32.MakeTable(crc32.Castagnoli)))
}

// signature is the content of the lock, which is that file.
func signature(at moment, ts []tenure, file string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "alive %s %d %d\n", at.boot, at.since, at.wall)
	for _, t := range ts {
		fmt.Fprintf(&b, "log %x\n", t.log[:])
		if t.epoch > 0 {
			fmt.Fprintln(&b, t.line(file))
		}
	}
	return b.String() + "crc " + checksum(b.String())
}

// signLife writes signs of life until ctx ends. tenures are those of the pools that are served at the moment.
func (d *dataDir) signLife(ctx context.Context, tenures func() []tenure, log *slog.Logger) {
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	failing := false
	for {
		_, err := d.lock.WriteAt([]byte(signature(now(), tenures(), d.file())), 0)
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
