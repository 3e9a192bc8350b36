package densetree

import "testing"

// TestLevel0GivesWay tells a level 0 that was merged from one that is still there, which no loop may merge again at once.
func TestLevel0GivesWay(t *testing.T) {
	tree := New(Options{})
	defer tree.Close()
	frozen := func(blocks uint64) []*Run {
		l0, _ := level0{}.put([]packed{pack(Entry{LBA: 1, Blocks: blocks, Kind: Hole})}, nil)
		return tree.memoryRuns(l0, true)
	}
	merged := frozen(1)
	for _, tt := range []struct {
		name  string
		now   []*Run
		fails bool
	}{
		{"nothing is frozen any more", nil, false},
		{"the next one is frozen", frozen(2), false},
		{"it is still there", merged, true},
		{"only its begin is gone", append(frozen(3), merged...), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := gone(merged, tt.now); (err != nil) != tt.fails {
				t.Errorf("got %v", err)
			}
		})
	}
}
