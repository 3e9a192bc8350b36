package pool

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/grains/segment"
)

func sampleRound() scrubRound {
	return scrubRound{
		started: 1_700_000_000, ended: 1_690_000_000, next: 4711, segments: 12, objects: 36, bytes: 1 << 30,
		found: ScrubCounts{Damaged: 3, Missing: 2, Repaired: 4, Unrepairable: 1, Unread: 5, LostBytes: 8192},
	}
}

func TestPositionOfAScrub(t *testing.T) {
	pool := [16]byte{1, 2, 3}
	b := golden(t, "scrub", sampleRound().encode(pool))
	if r, err := decodeScrubRound(b, pool); err != nil || r != sampleRound() {
		t.Errorf("%+v: %v", r, err)
	}
	for at := range b {
		bad := bytes.Clone(b)
		bad[at] ^= 0x10
		if r, err := decodeScrubRound(bad, pool); err == nil {
			t.Errorf("byte %d: %+v", at, r)
		}
	}
	newer := bytes.Clone(b)
	newer[4] = 9
	if _, err := decodeScrubRound(newer, pool); !errors.Is(err, segment.ErrNewer) {
		t.Errorf("version 9: %v", err)
	}
	if _, err := decodeScrubRound(b, [16]byte{9}); !errors.Is(err, segment.ErrDamaged) {
		t.Errorf("of another pool: %v", err)
	}
}

func FuzzScrubPosition(f *testing.F) {
	pool := [16]byte{1, 2, 3}
	f.Add(sampleRound().encode(pool))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeScrubRound(b, pool)
		if err == nil && !bytes.Equal(r.encode(pool), b) {
			t.Errorf("%s encodes to other bytes", hex.EncodeToString(b))
		}
	})
}

// TestAPoolIsScrubbedInRounds has a host scrub by itself, ends it in the middle of a round and goes on from there.
func TestAPoolIsScrubbedInRounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScrubWorld(t)
		r := w.rig(t, func(o *Options) { o.ScrubPeriod = time.Hour })
		var mu sync.Mutex
		looked := map[string]int{}
		for _, s := range r.stores {
			s.Before = func(op, key string) error {
				mu.Lock()
				defer mu.Unlock()
				if op == "stat" && strings.HasPrefix(key, "seg/") {
					looked[key]++
				}
				return nil
			}
		}
		// check wants every shard looked at so often, but for one that was damaged.
		check := func(damaged string, times int) {
			t.Helper()
			mu.Lock()
			defer mu.Unlock()
			for _, m := range w.memory {
				for _, key := range m.Keys() {
					if strings.HasPrefix(key, "seg/") && key != damaged && looked[key] != times {
						t.Fatalf("%s was looked at %d times, want %d", key, looked[key], times)
					}
				}
			}
		}
		var hurt string
		for _, key := range r.memory[1].Keys() {
			if strings.HasPrefix(key, "seg/") {
				hurt = key // the last
			}
		}
		r.memory[1].Damage(hurt, func(b []byte) []byte { b[5000] ^= 1; return b })
		r.open(true)
		time.Sleep(3 * time.Minute)
		mu.Lock()
		n := len(looked)
		mu.Unlock()
		if all := len(r.pool.segmentsFrom(0)); n == 0 || n >= 3*all*2/3 {
			t.Fatalf("%d shards of %d segments were looked at in a twentieth of the time", n, all)
		}
		r.abandon()
		r.open(false)
		time.Sleep(30 * time.Minute)
		check(hurt, 1)
		if !bytes.Equal(r.memory[1].Objects()[hurt], w.memory[1].Objects()[hurt]) {
			t.Errorf("%s is not mended", hurt)
		}
		s := r.pool.Status().Scrub
		if s.Round == nil || s.Round.Segments != s.Round.SegmentsTotal || s.Round.Repaired != 1 || s.Round.Ended.IsZero() {
			t.Errorf("status %+v", s.Round)
		}
		time.Sleep(time.Hour)
		check(hurt, 2)
		w.expect(r)
		r.abandon()
	})
}

// TestAScrubKeepsToItsRate scrubs at 1 MiB per second of a clock that is not the wall's.
func TestAScrubKeepsToItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newScrubWorld(t).rig(t, nil)
		r.open(true)
		begin := time.Now()
		rep := r.scrub(ScrubOptions{BytesPerSecond: 1 << 20})
		took := time.Since(begin).Seconds()
		if want := float64(rep.Bytes) / (1 << 20); took < want-4 || took > want+1 { // a stripe of pieces may be ahead
			t.Errorf("%d bytes in %.1f s", rep.Bytes, took)
		}
		r.abandon()
	})
}

// TestDamageThatReadsMeetIsRepaired reads a damaged shard and a missing one.
func TestDamageThatReadsMeetIsRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScrubWorld(t)
		r := w.rig(t, func(o *Options) { o.RepairReads = true })
		var hurt []string
		for i, key := range r.memory[1].Keys() {
			if !strings.HasPrefix(key, "seg/") {
				continue
			}
			hurt = append(hurt, key)
			if i%2 == 0 {
				r.memory[1].Damage(key, func(b []byte) []byte { clear(b[4096:]); return b })
			} else if err := r.memory[1].Delete(context.Background(), key); err != nil {
				t.Fatal(err)
			}
		}
		r.open(true)
		w.expect(r)
		time.Sleep(2 * metAgain)
		mended := int64(0)
		for _, key := range hurt {
			if bytes.Equal(r.memory[1].Objects()[key], w.memory[1].Objects()[key]) {
				mended++
			}
		}
		s := r.pool.Status().Scrub
		if mended == 0 || s.Found.Repaired != mended || s.Queue != 0 {
			t.Errorf("%d of %d shards mended, status %+v", mended, len(hurt), s)
		}
		r.abandon()
	})
}

// TestAnEmptiedTargetIsNotFilledByReads leaves a target alone that holds nothing any more.
func TestAnEmptiedTargetIsNotFilledByReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScrubWorld(t)
		r := w.rig(t, func(o *Options) { o.RepairReads = true })
		r.open(true)
		r.memory[1].Wipe()
		w.expect(r)
		time.Sleep(time.Hour)
		for _, key := range r.memory[1].Keys() {
			t.Errorf("%s was put at a target that may be another", key)
		}
		if n := r.pool.Status().Scrub.ReadBytes; n > 0 {
			t.Errorf("%d bytes were read for nothing", n)
		}
		r.abandon()
	})
}

// TestClosingEndsAScrub closes the pool while a scrub is at it.
func TestClosingEndsAScrub(t *testing.T) {
	r := newScrubWorld(t).rig(t, nil)
	r.open(true)
	begun := make(chan struct{}, 1000)
	held := make(chan struct{})
	for _, s := range r.stores {
		s.Before = func(op, key string) error {
			if op == "stat" {
				begun <- struct{}{}
				<-held
			}
			return nil
		}
	}
	ended := make(chan error)
	p := r.pool
	go func() {
		_, err := p.Scrub(context.Background(), ScrubOptions{})
		ended <- err
	}()
	<-begun
	go func() {
		<-p.scrubs.done
		close(held)
	}()
	r.abandon()
	if len(p.scrubs.turn) == 0 {
		t.Error("another scrub could begin on a closed pool")
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("the scrub says %v", err)
	}
}
