package vdisk

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestStripe expects that sharers go together, that one alone goes alone, and that it is not starved.
func TestStripe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s stripe
		s.init()
		s.RLock()
		s.RLock()
		var alone, late atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() {
			s.Lock()
			defer s.Unlock()
			alone.Store(true)
			time.Sleep(time.Second)
			if late.Load() {
				t.Error("it was not alone")
			}
		})
		synctest.Wait()
		wg.Go(func() { // must not overtake
			s.RLock()
			defer s.RUnlock()
			late.Store(true)
		})
		synctest.Wait()
		if s.RUnlock(); alone.Load() || late.Load() {
			t.Errorf("with one sharer left: alone=%v late=%v", alone.Load(), late.Load())
		}
		s.RUnlock()
		synctest.Wait()
		if !alone.Load() || late.Load() {
			t.Errorf("with none left: alone=%v late=%v", alone.Load(), late.Load())
		}
		wg.Wait()
		if !late.Load() {
			t.Error("the last sharer never came")
		}
	})
}

// TestStripeCounts has many goroutines take turns.
func TestStripeCounts(t *testing.T) {
	var s stripe
	s.init()
	n := 0
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 2000 {
				if i%2 == 0 {
					s.Lock()
					n++
					s.Unlock()
				} else {
					s.RLock()
					_ = n
					s.RUnlock()
				}
			}
		})
	}
	if wg.Wait(); n != 4*2000 {
		t.Errorf("%d turns, want %d", n, 4*2000)
	}
}

func BenchmarkStripe(b *testing.B) {
	var s stripe
	s.init()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s.RLock()
			_ = b
			s.RUnlock()
		}
	})
}

func BenchmarkRWMutex(b *testing.B) {
	var s sync.RWMutex
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s.RLock()
			_ = b
			s.RUnlock()
		}
	})
}
