package nbdclient

import (
	"errors"
	"slices"
	"testing"

	"graindisk/frontend/nbd/proto"
)

const extChunk = uint32(0x6e8a278c)

var everything = Options{Extended: true, Allocation: true}

// serveExtended answers EXTENDED_HEADERS, SET_META_CONTEXT and GO of a disk of 1 TiB.
func (p peer) serveExtended() {
	p.greet()
	p.expect("IHAVEOPT", uint32(11), uint32(0))
	p.send(optReply, uint32(11), uint32(1), uint32(0))
	p.expect("IHAVEOPT", uint32(10), uint32(31), uint32(4), "disk", uint32(1), uint32(15), "base:allocation")
	p.send(optReply, uint32(10), uint32(4), uint32(19), uint32(9), "base:allocation")
	p.send(optReply, uint32(10), uint32(1), uint32(0))
	p.expect("IHAVEOPT", uint32(7), uint32(16), uint32(4), "disk", uint16(3), uint16(1), uint16(2), uint16(3))
	p.send(optReply, uint32(7), uint32(3), uint32(12), uint16(0), uint64(1<<40), uint16(0xded))
	p.send(optReply, uint32(7), uint32(1), uint32(0))
}

// expectExtended takes a request with extended headers.
func (p peer) expectExtended(cmd, flags uint16, cookie, off, n uint64) {
	p.expect(uint32(0x21e41c71), flags, cmd, cookie, off, n)
}

// TestExtendedRequests checks the bytes of each request against vectors, and what is made of the replies.
func TestExtendedRequests(t *testing.T) {
	c, err := withServerFor(t, everything, func(p peer) {
		p.serveExtended()
		p.expectExtended(1, 0x21, 1, 5, 3)
		p.expect("abc")
		p.send(extChunk, uint16(1), uint16(0), uint64(1), uint64(5), uint64(0))
		p.expectExtended(0, 0, 2, 1<<33, 4)
		p.send(extChunk, uint16(0), uint16(1), uint64(2), uint64(1<<33), uint64(10), uint64(1<<33+2), "cd")
		p.send(extChunk, uint16(1), uint16(2), uint64(2), uint64(1<<33), uint64(12), uint64(1<<33), uint32(2))
		p.expectExtended(4, 0, 3, 0, 1<<40)
		p.send(extChunk, uint16(1), uint16(0x8001), uint64(3), uint64(0), uint64(8), uint32(28), uint16(2), "no")
		p.expectExtended(5, 0, 4, 7, 1<<39)
		p.send(extChunk, uint16(1), uint16(0), uint64(4), uint64(7), uint64(0))
		p.expectExtended(7, 8, 5, 7, 1<<39)
		p.send(extChunk, uint16(1), uint16(6), uint64(5), uint64(7), uint64(40), uint32(9), uint32(2),
			uint64(1<<38), uint64(3), uint64(5), uint64(0))
		p.expectExtended(2, 0, 0, 0, 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	if i := c.Info(); !i.Extended || !i.Structured || !i.Allocation || i.Size != 1<<40 {
		t.Errorf("info %+v", i)
	}
	got := []byte("????")
	if err := errors.Join(c.WriteAt(bg, []byte("abc"), 5, true), c.ReadAt(bg, got, 1<<33)); err != nil || string(got) != "\x00\x00cd" {
		t.Errorf("read %q: %v", got, err)
	}
	if err := c.Trim(bg, 0, 1<<40, false); !errors.Is(err, proto.ENOSPC) {
		t.Errorf("trim: %v", err)
	}
	if err := c.Cache(bg, 7, 1<<39); err != nil {
		t.Errorf("cache: %v", err)
	}
	status, err := c.BlockStatus(bg, 7, 1<<39, true)
	if want := []Status{{1 << 38, 3}, {5, 0}}; err != nil || !slices.Equal(status, want) {
		t.Errorf("status %v: %v", status, err)
	}
	_ = c.Close()
}

// TestBrokenExtendedReplies answers a BLOCK_STATUS of 100 bytes at 100 wrongly; the request fails.
func TestBrokenExtendedReplies(t *testing.T) {
	head := func(flags, typ uint16, off, n uint64) []byte { return be(extChunk, flags, typ, uint64(1), off, n) }
	for name, reply := range map[string][]byte{
		"a simple reply":         be(simple, uint32(0), uint64(1)),
		"a structured reply":     be(chunk, uint16(1), uint16(0), uint64(1), uint32(0)),
		"another offset":         head(1, 0, 99, 0),
		"no range at all":        head(1, 0, 100, 0),
		"a chunk without ranges": be(head(1, 6, 100, 8), uint32(9), uint32(0)),
		"half a range":           be(head(1, 6, 100, 16), uint32(9), uint32(1), uint64(5)),
		"a count that is wrong":  be(head(1, 6, 100, 24), uint32(9), uint32(2), uint64(5), uint64(0)),
		"an empty range":         be(head(1, 6, 100, 24), uint32(9), uint32(1), uint64(0), uint64(0)),
		"a range of 2^63":        be(head(1, 6, 100, 24), uint32(9), uint32(1), uint64(1<<63), uint64(0)),
		"a payload of 2^40":      head(1, 6, 100, 1<<40+8),
		"a payload of 4 GiB":     head(1, 6, 100, 0xfffffff8),
		"data":                   be(head(1, 1, 100, 9), uint64(100), "x"),
		"two of them": be(head(0, 6, 100, 24), uint32(9), uint32(1), uint64(5), uint64(0),
			head(1, 6, 100, 24), uint32(9), uint32(1), uint64(5), uint64(0)),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := withServerFor(t, everything, func(p peer) {
				p.serveExtended()
				p.expectExtended(7, 0, 1, 100, 100)
				_, _ = p.Write(reply)
			})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.BlockStatus(bg, 100, 100, false); err == nil {
				t.Error("success")
			}
		})
	}
}

// TestRefusedExtras asks a server that has none of them, and falls back.
func TestRefusedExtras(t *testing.T) {
	const unsup = uint32(1<<31 | 1)
	c, err := withServerFor(t, everything, func(p peer) {
		p.greet()
		p.expect("IHAVEOPT", uint32(11), uint32(0))
		p.send(optReply, uint32(11), unsup, uint32(0))
		p.expect("IHAVEOPT", uint32(8), uint32(0))
		p.send(optReply, uint32(8), uint32(1), uint32(0))
		p.expect("IHAVEOPT", uint32(10), uint32(31), uint32(4), "disk", uint32(1), uint32(15), "base:allocation")
		p.send(optReply, uint32(10), unsup, uint32(2), "no")
		p.expect("IHAVEOPT", uint32(7), uint32(16), uint32(4), "disk", uint16(3), uint16(1), uint16(2), uint16(3))
		p.send(optReply, uint32(7), uint32(3), uint32(12), uint16(0), uint64(1<<40), uint16(0xded))
		p.send(optReply, uint32(7), uint32(1), uint32(0))
		p.expectRequest(4, 0, 1, 2)
	})
	if err != nil {
		t.Fatal(err)
	}
	if i := c.Info(); i.Extended || !i.Structured || i.Allocation {
		t.Errorf("info %+v", i)
	}
	if err := c.Trim(bg, 0, 1<<32, false); !errors.Is(err, proto.EINVAL) {
		t.Errorf("4 GiB with compact headers: %v", err)
	}
	if err := c.Trim(bg, 1, 2, false); err == nil {
		t.Error("a request that was not answered succeeded")
	}
}

// FuzzExtendedReplies feeds arbitrary bytes to a client that waits for a block status.
func FuzzExtendedReplies(f *testing.F) {
	f.Add(be(extChunk, uint16(1), uint16(6), uint64(1), uint64(100), uint64(24), uint32(9), uint32(1), uint64(5), uint64(3)))
	f.Add(be(extChunk, uint16(1), uint16(5), uint64(1), uint64(100), uint64(12), uint32(9), uint32(5), uint32(3)))
	f.Add(be(extChunk, uint16(1), uint16(0x8001), uint64(1), uint64(100), uint64(8), uint32(5), uint16(2), "no"))
	f.Fuzz(func(t *testing.T, replies []byte) {
		c, err := withServerFor(t, everything, func(p peer) {
			p.serveExtended()
			p.expectExtended(7, 0, 1, 100, 10)
			_, _ = p.Write(replies)
		})
		if err != nil {
			t.Fatal(err)
		}
		status, err := c.BlockStatus(bg, 100, 10, false)
		for _, s := range status {
			if s.Len <= 0 {
				t.Errorf("range %+v", s)
			}
		}
		if err == nil && len(status) == 0 || len(status) > len(replies)/8 {
			t.Errorf("%d ranges from %d bytes", len(status), len(replies))
		}
	})
}
