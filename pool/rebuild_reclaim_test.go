package pool

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"graindisk/vdisk"
)

// TestRebuildAfterReclaim writes, trims, renames, resizes and deletes disks for days, with the owner lost now and
// then, until most of what was ever stored has been deleted, and rebuilds from what is left.
func TestRebuildAfterReclaim(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, i))
			r := reclaimRig(t)
			now := map[string][]byte{}
			for day := range 12 {
				name := fmt.Sprintf("d%d", rng.IntN(4))
				if now[name] == nil {
					r.disk(name, 2<<20)
					now[name] = make([]byte, 2<<20)
				}
				for range 1 + rng.IntN(6) {
					m := now[name]
					off, n := rng.IntN(len(m)/4096)*4096, (1+rng.IntN(64))*4096
					n = min(n, len(m)-off)
					if rng.IntN(3) == 0 {
						if err := r.disk(name, 0).Write(t.Context(), []vdisk.Op{{Kind: vdisk.OpTrim, Off: int64(off), Len: int64(n)}}, true); err != nil {
							t.Fatal(err)
						}
						clear(m[off:][:n])
					} else {
						p := make([]byte, n)
						for i := range p {
							p[i] = byte(rng.Uint32())
						}
						copy(m[off:], p)
						r.write(r.disk(name, 0), int64(off), p)
					}
					if rng.IntN(2) == 0 {
						r.publish()
					}
				}
				switch rng.IntN(5) {
				case 0:
					if err := r.pool.DeleteDisk(t.Context(), name, true, false); err != nil {
						t.Fatal(err)
					}
					delete(now, name)
				case 1:
					to := fmt.Sprintf("renamed%d", day)
					if _, err := r.pool.RenameDisk(t.Context(), name, to, false); err != nil {
						t.Fatal(err)
					}
					now[to] = now[name]
					delete(now, name)
				case 2:
					size := (1 + rng.IntN(3)) << 20
					if _, err := r.pool.ResizeDisk(t.Context(), name, int64(size), true); err != nil {
						t.Fatal(err)
					}
					m := slices.Clone(now[name][:min(size, len(now[name]))])
					now[name] = append(m, make([]byte, size-len(m))...)
				}
				r.publish()
				if rng.IntN(2) == 0 {
					time.Sleep(time.Duration(rng.IntN(90)) * time.Minute)
					synctest.Wait()
				}
				if rng.IntN(4) == 0 {
					r.abandon()
					r.newHost()
					r.open(true)
				}
			}
			r.publish()
			st := r.pool.Status().Space
			cut := r.pool.value().Cut
			r.abandon()
			r.loseRoot()
			rep := r.rebuild(RebuildOptions{})
			t.Logf("reclaimed %d segments; cut %d, committed %d; %+v", st.ReclaimedSegments, rep.Cut, cut, rep)
			if rep.Cut < cut {
				t.Fatalf("cut %d came back, %d was committed", rep.Cut, cut)
			}
			if len(r.pool.Disks()) != len(now) {
				t.Errorf("disks: %v, want %d", r.pool.Disks(), len(now))
			}
			for name, m := range now {
				d, err := r.pool.Disk(name)
				if err != nil {
					t.Fatal(err)
				}
				if d.Size() != int64(len(m)) {
					t.Errorf("disk %s has %d bytes, want %d", name, d.Size(), len(m))
				}
				r.expect(d, m)
			}
			r.expectCounts()
			time.Sleep(time.Hour) // the new owner reclaims on
			synctest.Wait()
			r.publish()
			r.expectCounts()
			r.abandon()
			r.loseRoot()
			r.rebuild(RebuildOptions{})
			for name, m := range now {
				r.expect(r.disk(name, 0), m)
			}
			r.abandon()
		})
	}
}
