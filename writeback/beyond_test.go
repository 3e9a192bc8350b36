package writeback

import (
	"fmt"
	"testing"
)

// TestBeyondTellsWhatIsAboveAHorizon asks over several generations, open and after a reopen.
func TestBeyondTellsWhatIsAboveAHorizon(t *testing.T) {
	r := newRig(t, 8, 64)
	r.append(data(0, 1, 2), data(50, 3))
	first := r.log.Freeze()
	r.append(data(2, 4), unmap(20, 4), Record{Kind: Data, Disk: 9, LBA: 7, Data: stampBlock(5)})
	second := r.log.Freeze()
	r.append(data(1, 6, 7, 8), unmap(24, 2), Record{Kind: Op, Disk: 3, Data: []byte("x")})
	all := []DiskRecords{
		{1, []Range{{0, 4}, {50, 1}}, []Range{{20, 6}}, 0}, {3, nil, nil, 1}, {9, []Range{{7, 1}}, nil, 0},
	}
	for _, c := range []struct {
		horizon Seq
		want    []DiskRecords
	}{
		{0, all},
		{first.Seq - 1, all}, // within a generation: all of it
		{first.Seq, []DiskRecords{{1, []Range{{1, 3}}, []Range{{20, 6}}, 0}, {3, nil, nil, 1}, {9, []Range{{7, 1}}, nil, 0}}},
		{second.Seq, []DiskRecords{{1, []Range{{1, 3}}, []Range{{24, 2}}, 0}, {3, nil, nil, 1}}},
	} {
		if got := r.log.Beyond(c.horizon); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("beyond %d: %v, want %v", c.horizon, got, c.want)
		}
	}
	if err := r.log.Publish(first); err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(r.log.Beyond(0)), fmt.Sprint(r.log.Beyond(first.Seq)); got != want {
		t.Errorf("after publication %v, want %v", got, want)
	}
	want := fmt.Sprint(r.log.Beyond(second.Seq))
	if _, err := r.reopen(r.fs.ProcessCrash); err != nil {
		t.Fatal(err)
	}
	if err := r.log.DropThrough(second.Seq); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.log.Beyond(second.Seq)); got != want {
		t.Errorf("after a reopen %v, want %v", got, want)
	}
}

func TestUnionJoinsWhatOverlapsOrTouches(t *testing.T) {
	for _, c := range []struct{ in, want []Range }{
		{nil, nil},
		{[]Range{{5, 1}}, []Range{{5, 1}}},
		{[]Range{{5, 1}, {0, 5}}, []Range{{0, 6}}},
		{[]Range{{0, 10}, {2, 3}, {9, 4}, {14, 1}}, []Range{{0, 13}, {14, 1}}},
	} {
		if got := union(c.in); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}
