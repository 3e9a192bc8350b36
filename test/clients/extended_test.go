package clients

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"graindisk/frontend/nbd/nbdclient"
	"graindisk/frontend/nbd/proto"
)

// TestExtendedHeaders drives the disk of 1 TiB by our own client, since the distribution's clients do not know
// extended headers yet, and checks with theirs what it did.
func TestExtendedHeaders(t *testing.T) {
	needNbdsh(t)
	s := serve(t)
	ctx := context.Background()
	c, err := nbdclient.Dial(ctx, s.uri("big"), nbdclient.Options{Extended: true, Allocation: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if i := c.Info(); !i.Extended || !i.Allocation || i.Size != 1<<40 {
		t.Fatalf("info %+v", i)
	}
	data := bytes.Repeat([]byte("seven b"), 30_000)
	for _, op := range []func() error{
		func() error { return c.Trim(ctx, 0, 1<<40, false) },
		func() error { return c.WriteZeroes(ctx, 0, 1<<40, proto.CmdFlagFastZero|proto.CmdFlagFUA) },
	} {
		got := make([]byte, len(data))
		if err := errors.Join(c.WriteAt(ctx, data, 700<<30+5, true), c.ReadAt(ctx, got, 700<<30+5)); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("read back: %v", err)
		}
		const blocks = (int64(5+30_000*7) + 4095) / 4096 * 4096
		want := []nbdclient.Status{{Len: 700 << 30, State: 3}, {Len: blocks}, {Len: 1<<40 - 700<<30 - blocks, State: 3}}
		if got, err := c.BlockStatus(ctx, 0, 1<<40, false); err != nil || !slices.Equal(got, want) {
			t.Errorf("status %v, want %v: %v", got, want, err)
		}
		if err := errors.Join(c.Cache(ctx, 0, 1<<40), op(), c.Flush(ctx)); err != nil {
			t.Fatal(err)
		}
		if got, err := c.BlockStatus(ctx, 1, 1<<40-1, false); err != nil || len(got) != 1 || got[0].Len != 1<<40-1 || got[0].State != 3 {
			t.Errorf("status afterwards %v: %v", got, err)
		}
		s.nbdsh(t, "big", `same(h.pread(1*M, 700*G), bytes(1*M))`)
	}
}
