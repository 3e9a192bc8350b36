package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
	"graindisk/internal/crashtest"
	"graindisk/vdisk/densetree"
)

const (
	gib = int64(1) << 30
	tib = int64(1) << 40

	look = 16 << 10 // how much is read at each place
)

// scatter puts data everywhere on a disk of 1 TiB: n extents in the map, and blocks in the log in n/4 places.
func scatter(t testing.TB, h *host, c *nbdclient.Client, n int64) (offs []int64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	var es []densetree.Entry
	for i := range n {
		at := i*(tib/n) + rng.Int64N(gib/block.Size-16)*block.Size
		es = append(es, densetree.Entry{LBA: block.LBA(at / block.Size), Blocks: 16, Kind: densetree.Data,
			Extent: block.NewExtentID(1, int(i)), Orig: 16})
		offs = append(offs, at)
	}
	h.tree.Put(es)
	for i := range n / 4 {
		at := i*(4*tib/n) + rng.Int64N(gib)
		if err := c.WriteAt(bg, bytes.Repeat([]byte{9}, 9000), at, false); err != nil {
			t.Fatal(err)
		}
		offs = append(offs, at)
	}
	return append(offs, 0, tib-look)
}

// TestUnmapOfAnySizeIsFewRecords trims and zeroes ranges up to a whole disk of 1 TiB that has data all over it. Each
// request is a record, and a block at either edge that is zeroed in part, one more; what it covers reads as
// zeroes, the rest as before.
func TestUnmapOfAnySizeIsFewRecords(t *testing.T) {
	type rng struct{ off, n int64 }
	split := func(part int64) (rs []rng) {
		for off := int64(0); off < tib; off += part {
			rs = append(rs, rng{off, part})
		}
		return rs
	}
	for _, tt := range []struct {
		name    string
		ranges  []rng
		records uint64 // of each range, at most
	}{
		{"4 GiB - 1 from the start", []rng{{0, 4*gib - 1}}, 2},
		{"4 GiB - 1 across blocks", []rng{{512*gib + 1, 4*gib - 1}}, 2},
		{"4 GiB - 1 up to the end", []rng{{tib - 4*gib + 1, 4*gib - 1}}, 2},
		{"all but both ends", []rng{{511, tib - 1023}}, 3},
		{"the whole disk in one", []rng{{0, tib}}, 1},
		{"512 times 2 GiB", split(2 * gib), 1},
	} {
		for _, cmd := range []proto.Cmd{proto.CmdTrim, proto.CmdWriteZeroes} {
			t.Run(fmt.Sprintf("%s/%s", tt.name, cmd), func(t *testing.T) {
				h := boot(t, crashtest.NewFS(crashtest.Options{}), tib, ListenOptions{}, true)
				c := h.client(nbdclient.Options{Extended: true, Allocation: true})
				offs := scatter(t, h, c, 128)
				for _, r := range tt.ranges {
					offs = append(offs, max(0, r.off-4096), min(tib-look, r.off+r.n-4096))
				}
				read := func() (all [][]byte) {
					for _, off := range offs {
						p := make([]byte, look)
						if err := c.ReadAt(bg, p, off); err != nil {
							t.Fatal(err)
						}
						all = append(all, p)
					}
					return all
				}
				want, before := read(), h.records()
				for _, r := range tt.ranges {
					var err error
					from, to := r.off, r.off+r.n
					if cmd == proto.CmdTrim {
						err = c.Trim(bg, r.off, r.n, true)
						from, to = (from+block.Size-1)&^(block.Size-1), to&^(block.Size-1)
					} else {
						err = c.WriteZeroes(bg, r.off, r.n, proto.CmdFlagFUA)
					}
					if err != nil {
						t.Fatal(err)
					}
					for i, off := range offs {
						if a, b := max(from, off), min(to, off+look); a < b {
							clear(want[i][a-off : b-off])
						}
					}
				}
				if n := h.records() - before; n == 0 || n > tt.records*uint64(len(tt.ranges)) {
					t.Errorf("%d records for %d requests", n, len(tt.ranges))
				}
				for i, got := range read() {
					if !bytes.Equal(got, want[i]) {
						t.Fatalf("what is at %d is wrong", offs[i])
					}
				}
				if tt.ranges[0].n == tib {
					if s, err := c.BlockStatus(bg, 0, tib, false); err != nil || len(s) != 1 || s[0] != (nbdclient.Status{Len: tib, State: 3}) {
						t.Errorf("status of the disk: %v, %v", s, err)
					}
				}
			})
		}
	}
}

// BenchmarkUnmap unmaps a disk of 1 TiB that has data all over it; the bound is 100 ms for all of it.
func BenchmarkUnmap(b *testing.B) {
	for _, cmd := range []string{"trim", "zero"} {
		for _, part := range []int64{tib, 2 * gib} {
			b.Run(fmt.Sprintf("%s/%d-requests", cmd, tib/part), func(b *testing.B) {
				h := boot(b, crashtest.NewFS(crashtest.Options{}), tib, ListenOptions{}, true)
				c := h.client(nbdclient.Options{Extended: true})
				for b.Loop() {
					b.StopTimer()
					scatter(b, h, c, 1024)
					b.StartTimer()
					for off := int64(0); off < tib; off += part {
						var err error
						if cmd == "trim" {
							err = c.Trim(bg, off, part, false)
						} else {
							err = c.WriteZeroes(bg, off, part, proto.CmdFlagNoHole)
						}
						if err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}
