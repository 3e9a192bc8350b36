package pool

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"graindisk/block"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/writeback"
)

type metaRecord struct {
	kind uint8
	b    []byte
}

// longPublication is a publication of n segments in records of about full bytes.
func longPublication(t testing.TB, n, full int) (rec *segment.CutRecord, infos []segment.Info, recs []metaRecord) {
	t.Helper()
	rec = &segment.CutRecord{Epoch: 3, Cut: 17, PrevCut: 16, PrevCRC: 1, Horizon: 1234, Time: 1700000000}
	var idx []*segment.Index
	for i := range n {
		b, err := segment.NewBuilder(segment.BuildOptions{
			ID: block.SegmentID(7 + i), Epoch: 3, K: 1, M: 1, Cut: 17, PayloadBytes: 4096, Rand: bytes.NewReader(make([]byte, 64)),
		})
		if err != nil {
			t.Fatal(err)
		}
		p, err := b.Add(1, block.LBA(40+i), 1, 1234)
		if err != nil {
			t.Fatal(err)
		}
		copy(p, "graindisk")
		var s *segment.Sealed
		if i == n-1 {
			s, err = b.Seal(rec, []block.TargetID{1, 2})
		} else {
			s, err = b.Seal(nil, []block.TargetID{1, 2})
			rec.Segments = append(rec.Segments, s.Info)
		}
		if err != nil {
			t.Fatal(err)
		}
		infos, idx = append(infos, s.Info), append(idx, s.Index)
	}
	err := eachPublicationRecord(rec, infos, idx, full, func(kind uint8, b []byte) error {
		recs = append(recs, metaRecord{kind, b})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return rec, infos, recs
}

func TestGoldenPublicationInPieces(t *testing.T) {
	_, infos, recs := longPublication(t, 5, 200)
	if n := len(recs); n < 3 || recs[n-1].kind != metaPublicationEnd || recs[0].kind != metaPublicationPart {
		t.Fatalf("%d records", n)
	}
	part, end := golden(t, "publication-part", recs[0].b), golden(t, "publication-end", recs[len(recs)-1].b)
	recs[0].b, recs[len(recs)-1].b = part, end
	var row publicationRow
	for _, r := range recs[:len(recs)-1] {
		if err := row.add(r.b); err != nil {
			t.Fatal(err)
		}
	}
	rec, got, idx, err := row.end(end)
	if err != nil || rec.Cut != 17 || len(got) != len(infos) || len(idx) != len(infos) {
		t.Fatalf("%+v, %d segments, %v", rec, len(got), err)
	}
	for i := range infos {
		if got[i].ID != infos[i].ID || idx[i].Entries[0].LBA != block.LBA(40+i) {
			t.Errorf("segment %d comes back as %+v", i, got[i])
		}
	}
	for n := range part {
		if err := new(publicationRow).add(part[:n]); err == nil {
			t.Errorf("the first %d bytes of %d decode", n, len(part))
		}
	}
	// One record is enough for a cut of usual size, and is of the first release's kind.
	if _, _, one := longPublication(t, 5, 1<<20); len(one) != 1 || one[0].kind != metaPublication {
		t.Errorf("%d records for a short publication", len(one))
	}
}

// TestPublicationRowsAreWholeOrNothing cuts a row short after every record, repeats it as recovery does,
// and leaves out records.
func TestPublicationRowsAreWholeOrNothing(t *testing.T) {
	_, infos, recs := longPublication(t, 6, 150)
	replay := func(recs []metaRecord) (*Pool, error) {
		p := &Pool{segments: map[block.SegmentID]segment.Info{}, usage: extent.NewUsage(), o: Options{}.withDefaults()}
		p.pub = newPublisher()
		p.pub.cut = 16
		var ms []writeback.MetaRecord
		for _, r := range recs {
			ms = append(ms, writeback.MetaRecord{Kind: r.kind, Payload: r.b})
		}
		return p, p.replayMeta(ms, true)
	}
	for n := range recs {
		if p, err := replay(recs[:n]); err != nil || p.pub.cut != 16 || len(p.segments) != 0 {
			t.Errorf("%d of %d records: cut %d, %v", n, len(recs), p.pub.cut, err)
		}
		p, err := replay(append(append([]metaRecord{}, recs[:n]...), recs...))
		if err != nil || p.pub.cut != 17 || len(p.segments) != len(infos) {
			t.Errorf("%d of %d records, then all: cut %d, %d segments, %v", n, len(recs), p.pub.cut, len(p.segments), err)
		}
		without := append(append([]metaRecord{}, recs[:n]...), recs[n+1:]...)
		if n < len(recs)-1 {
			if _, err := replay(without); !errors.Is(err, writeback.ErrDamaged) {
				t.Errorf("without record %d: %v", n, err)
			}
		}
	}
	if p, err := replay(append(append([]metaRecord{}, recs...), recs...)); err != nil || p.pub.cut != 17 {
		t.Errorf("twice: %v", err)
	}
}

func FuzzPublicationPart(f *testing.F) {
	_, _, recs := longPublication(f, 5, 200)
	f.Add(recs[0].b, recs[len(recs)-1].b)
	f.Fuzz(func(t *testing.T, part, end []byte) {
		var row publicationRow
		if err := row.add(part); err != nil {
			return
		}
		if got := encodePublicationPart(row.cut, 0, row.infos, row.idx); !bytes.Equal(got, part) {
			t.Error("what decodes does not encode back")
		}
		_, _, _, _ = row.end(end) // must not panic
	})
}

// TestALongCutComesBackFromTheTier publishes a cut in pieces and reads it back from the tier, also when
// the row was cut short.
func TestALongCutComesBackFromTheTier(t *testing.T) {
	r := newRig(t, func(o *Options) { o.SegmentBytes, o.publicationBytes = 64<<10, 1000 })
	model := make([]byte, testDisk)
	for i := range model {
		model[i] = byte(rand.Uint32())
	}
	r.write(r.disk("d", testDisk), 0, model)
	r.publish()
	rec, infos, recs := longPublication(t, 3, 100)
	if len(recs) < 2 || len(infos) != 3 || rec.Cut == 0 {
		t.Fatalf("%d records", len(recs))
	}
	// A row of a later cut that was cut short says nothing.
	if err := r.pool.log.AppendMeta(metaPublicationPart, recs[0].b); err != nil {
		t.Fatal(err)
	}
	r.abandon()
	r.open(false)
	r.expect(r.disk("d", testDisk), model)
}
