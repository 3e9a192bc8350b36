package pool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/uuid"

	"graindisk/block"
	"graindisk/grains/segment"
	"graindisk/internal/crashtest"
	"graindisk/writeback"
)

// TestFirstCheckpointFails has the first local checkpoint of a new tier fail. A gateway that served all the
// same would lose what it acknowledged at its next start, which finds no map and takes that of the targets.
func TestFirstCheckpointFails(t *testing.T) {
	for _, fault := range []crashtest.Fault{
		{Op: crashtest.OpCreate, Path: "host/tier/ckpt-*", Count: 1},
		{Op: crashtest.OpWrite, Path: "host/tier/ckpt-*", Skip: 1, Count: 1},
		{Op: crashtest.OpSync, Path: "host/tier/ckpt-*", Skip: 1, Count: 1},
	} {
		t.Run(fault.Op.String(), func(t *testing.T) {
			r := newRig(t, nil)
			if err := r.pool.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
			r.pool = nil
			r.newHost()
			r.fs.Inject(fault)
			if err := r.tryOpen(false); err == nil {
				t.Error("the pool serves without a local checkpoint")
			}
			if r.pool != nil {
				r.abandon()
			}
			r.open(false)
			want := bytes.Repeat([]byte("x"), 3*block.Size)
			r.write(r.disk("d", 1<<20), 0, want)
			r.abandon()
			r.open(false)
			r.expect(r.disk("d", 1<<20), want)
		})
	}
}

// TestNoCheckpointKeepsTheLog opens a tier that was served though its first checkpoint had failed, as an
// earlier release did: what only the log has stays, also through the next crash and the next publication.
func TestNoCheckpointKeepsTheLog(t *testing.T) {
	r := newRig(t, nil)
	if err := r.pool.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.pool = nil
	r.newHost()
	r.fs.Inject(crashtest.Fault{Op: crashtest.OpCreate, Path: "host/tier/ckpt-*", Count: 1})
	if err := r.tryOpen(false); err == nil {
		t.Fatal("the pool serves without a local checkpoint")
	}

	want := bytes.Repeat([]byte("x"), 2*block.Size)
	id, err := writeback.ReadIdentity(r.fs, "/host/tier")
	if err != nil {
		t.Fatal(err)
	}
	served := &Pool{o: r.options(false).withDefaults(), uuid: uuid.UUID(id.Pool)}
	if _, err := served.openTier(); err != nil {
		t.Fatal(err)
	}
	made, err := json.Marshal(op{Meta: &segment.DiskMeta{Name: "d", SizeBytes: 1 << 20}})
	if err == nil {
		_, err = served.log.Append(context.Background(), []writeback.Record{
			{Kind: writeback.Op, Disk: 1, Data: made}, {Kind: writeback.Data, Disk: 1, LBA: 3, Data: want},
		})
	}
	if err = errors.Join(err, served.closeTier()); err != nil {
		t.Fatal(err)
	}

	for range 2 {
		r.open(false)
		r.expect(r.disk("d", 1<<20), append(make([]byte, 3*block.Size), want...))
		r.abandon()
	}
	r.open(false)
	r.publish()
	r.abandon()
	r.newHost()
	r.open(true)
	r.expect(r.disk("d", 1<<20), append(make([]byte, 3*block.Size), want...))
}
