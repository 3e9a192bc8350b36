package writeback

import (
	"context"
	"errors"
	"path"
	"sync"
	"syscall"
	"testing"
	"time"

	"graindisk/block"
	"graindisk/internal/crashtest"
	"graindisk/internal/vfs"
)

// flyFreely lets even the smallest batches be in flight next to each other.
func (l *Log) flyFreely() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beside = 0
}

// stopFS is a file system whose writes to slots wait, once it is shut, until the test lets each pass.
type stopFS struct {
	vfs.FS
	mu   sync.Mutex
	shut bool
	held []*heldWrite
}

type heldWrite struct {
	off  int64
	pass chan error // nil lets the write pass, else it fails so
}

type gatedFile struct {
	vfs.File
	g *stopFS
}

func (g *stopFS) wrap(name string, f vfs.File, err error) (vfs.File, error) {
	if ok, _ := path.Match(slotFiles, name); !ok || err != nil {
		return f, err
	}
	return gatedFile{f, g}, nil
}

func (g *stopFS) Open(name string) (vfs.File, error) {
	f, err := g.FS.Open(name)
	return g.wrap(name, f, err)
}

func (g *stopFS) Create(name string) (vfs.File, error) {
	f, err := g.FS.Create(name)
	return g.wrap(name, f, err)
}

func (f gatedFile) WritevAt(bufs [][]byte, off int64) error {
	f.g.mu.Lock()
	if f.g.shut {
		h := &heldWrite{off, make(chan error, 1)}
		f.g.held = append(f.g.held, h)
		f.g.mu.Unlock()
		if err := <-h.pass; err != nil {
			return err
		}
	} else {
		f.g.mu.Unlock()
	}
	return f.File.WritevAt(bufs, off)
}

// set shuts or opens the gate for writes to come.
func (g *stopFS) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = shut
}

// wait returns the n-th write held, by place in the file.
func (g *stopFS) wait(n int) *heldWrite {
	for {
		g.mu.Lock()
		if len(g.held) > n {
			h := g.held[n]
			g.mu.Unlock()
			return h
		}
		g.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
}

// TestLaterBatchWaitsForTheEarlier lets the second of two batches land first, and the first one then
// land or fail.
func TestLaterBatchWaitsForTheEarlier(t *testing.T) {
	for _, failure := range []error{nil, syscall.EIO, syscall.ENOSPC} {
		name := "lands"
		if failure != nil {
			name = failure.Error()
		}
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 8, 64)
			r.log.Close()
			g := &stopFS{FS: r.fs}
			space, err := tryOpenSpace(g, testDir, 8, 64)
			if err != nil {
				t.Fatal(err)
			}
			l, _, err := Open(Options{FS: g, Dir: testDir, Space: space, Pool: testPool})
			if err == nil {
				err = l.DropThrough(0)
			}
			if err != nil {
				t.Fatal(err)
			}
			r.space, r.log = space, l
			l.flyFreely()
			r.append(data(0, 1))
			r.sync()
			r.settle()
			g.set(true)
			var wg sync.WaitGroup
			var seqs [2]Seq
			write := func(i int) {
				wg.Go(func() {
					var err error
					if seqs[i], err = l.Append(bg, []Record{data(block.LBA(1+i), uint64(2+i))}); err != nil {
						t.Error(err)
					}
				})
			}
			write(0)
			first := g.wait(0)
			write(1)
			second := g.wait(1)
			second.pass <- nil
			for landed := false; !landed; time.Sleep(time.Millisecond) {
				l.mu.Lock()
				landed = l.flight[1].landed
				l.mu.Unlock()
			}
			if second.off <= first.off {
				t.Errorf("the later batch is at %d, the earlier at %d", second.off, first.off)
			}
			if l.Written() != 1 {
				t.Errorf("written through %d while the batch before is not", l.Written())
			}
			r.expect(0, 1, -1, -1)
			r.sync() // what is in flight is not waited for
			if l.Stable() != 1 {
				t.Errorf("stable through %d", l.Stable())
			}
			g.set(false)
			first.pass <- failure
			wg.Wait()
			if seqs != [2]Seq{2, 3} {
				t.Errorf("sequences %v", seqs)
			}
			r.expect(0, 1, 2, 3)
			if err := l.Sync(bg); err != nil {
				t.Fatal(err)
			}
			if got, want := l.Health().Mended, errors.Is(failure, syscall.EIO); (got == 1) != want {
				t.Errorf("%d files mended", got)
			}
			r.stableNow(1, 2, 3)
		})
	}
}

// TestAppendLeavesAWriteThatIsRefused ends the wait of an append whose batch the file system refuses,
// and changes its buffer at once: what is written in the end is what was given.
func TestAppendLeavesAWriteThatIsRefused(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1))
	r.settle()
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpWrite, Path: slotFiles, Err: syscall.ENOSPC})
	ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
	defer cancel()
	rec := data(1, 2)
	if _, err := r.log.Append(ctx, []Record{rec}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("append: %v", err)
	}
	clear(rec.Data)
	r.fs.ClearFaults()
	r.append(data(2, 3))
	r.expect(0, 1, 2, 3)
	r.sync()
	r.stableNow(1, 2, 3)
}
