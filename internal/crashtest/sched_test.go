package crashtest

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// scheduledRun has a few goroutines write, sync, sleep and take a lock under a scheduler and returns the order in which
// their calls took effect.
func scheduledRun(t *testing.T, seed uint64) (order []string, hash uint64) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		s := NewSched(seed, func(label string) { order = append(order, label) })
		defer s.Stop()
		fs := NewFS(Options{})
		fs.SetGate(s)
		var lock sync.Mutex
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				f, err := fs.Create(fmt.Sprintf("file-%d", i))
				if err != nil {
					t.Error(err)
					return
				}
				for n := range 5 {
					time.Sleep(time.Duration(1000+1237*i) * time.Millisecond) // timers of one moment fire in any order
					lock.Lock()                                               // held over I/O: those who wait for it are not idle to synctest.Wait
					_, err := f.WriteAt([]byte{1}, int64(n))
					lock.Unlock()
					if err == nil {
						err = f.Sync()
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		hash, _ = s.Hash()
	})
	return order, hash
}

// TestSchedRepeats expects one order from one seed, and several from several.
func TestSchedRepeats(t *testing.T) {
	orders := map[uint64]bool{}
	for seed := range uint64(30) {
		a, ha := scheduledRun(t, seed)
		b, hb := scheduledRun(t, seed)
		if !slices.Equal(a, b) || ha != hb {
			t.Fatalf("seed %d ran in two ways:\n%v\n%v", seed, a, b)
		}
		orders[ha] = true
		if len(a) != 4+4*5*3 { // create; write, sync and its end
			t.Fatalf("seed %d: %d calls", seed, len(a))
		}
	}
	if len(orders) < 25 {
		t.Errorf("30 seeds gave %d orders", len(orders))
	}
}

// TestSchedStop lets go what is parked, and whatever comes later.
func TestSchedStop(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		s := NewSched(1, nil)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { s.Park("call") })
		}
		s.Stop()
		wg.Wait()
		s.Park("after the end")
	})
	var none *Sched
	none.Park("nobody schedules")
	none.Stop()
}

func TestHash(t *testing.T) {
	fs := NewFS(Options{})
	write := func(fs *FS, name string, p string, off int64) {
		t.Helper()
		f, err := fs.Create(name)
		if err == nil {
			_, err = f.WriteAt([]byte(p), off)
		}
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(fs, "a", "content", 4096)
	if err := fs.SyncDir("/"); err != nil {
		t.Fatal(err)
	}
	was := fs.Hash()
	if now := fs.Peek(1, KeepNone).Hash(); now != was {
		t.Errorf("all is stable, and the hash after a power cut is %x, not %x", now, was)
	}
	for _, change := range []struct {
		what string
		do   func(fs *FS)
	}{
		{"another file", func(fs *FS) { write(fs, "b", "", 0) }},
		{"another byte", func(fs *FS) { write(fs, "a", "Content", 4096) }},
		{"another place", func(fs *FS) { write(fs, "a", "content", 512) }},
		{"another length", func(fs *FS) { write(fs, "a", "content\x00", 4096) }},
	} {
		other := fs.Peek(1, KeepNone)
		if change.do(other); other.Hash() == was {
			t.Errorf("%s gives the same hash", change.what)
		}
	}
}

func TestOnPowerCut(t *testing.T) {
	fs := NewFS(Options{})
	told := 0
	fs.OnPowerCut(func() { told++ })
	fs.CutAfter(2)
	f, err := fs.Create("dir-17")
	if err != nil {
		t.Fatal(err)
	}
	if told != 0 || fs.CutIn() != "" {
		t.Errorf("told %d times of %q before the cut", told, fs.CutIn())
	}
	_, _ = f.WriteAt([]byte{1}, 0)
	fs.PowerCut()
	if told != 1 || fs.CutIn() != "write:dir-" {
		t.Errorf("told %d times, at %q", told, fs.CutIn())
	}
}
