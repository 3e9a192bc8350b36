package pool

import (
	"encoding/json"
	"fmt"

	"graindisk/block"
	"graindisk/grains/segment"
)

// tableRef names a part of the same checkpoint that holds a table.
type tableRef struct {
	Part  int    `json:"part"`
	Bytes int64  `json:"bytes"`
	CRC   uint32 `json:"crc"` // of the part's body
}

// A table is rows of a snapshot's Disks and Segments, stored as JSON. A disk's runs may go on in the
// next table.
type table struct {
	Disks    []diskState    `json:"disks,omitempty"`
	Segments []segment.Info `json:"segments,omitempty"`
}

// tableRowsMax is how many rows, runs and segments, a manifest or a table holds: some 4 MB.
const tableRowsMax = 16 << 10

// split encodes a snapshot as a manifest and, if it has more rows than max, the tables that hold them,
// numbered from part on.
func (s *snapshot) split(part, max int) (manifest []byte, tables [][]byte, err error) {
	head := *s
	var cut []table
	if s.rows() > max {
		head.Disks, head.Segments = nil, nil
		cut = s.cut(max)
	}
	for i, t := range cut {
		b, err := json.Marshal(t)
		if err != nil {
			return nil, nil, err
		}
		tables = append(tables, b)
		head.Tables = append(head.Tables, tableRef{Part: part + i, Bytes: int64(len(b)), CRC: block.CRC(b)})
	}
	manifest, err = json.Marshal(head)
	return manifest, tables, err
}

func (s *snapshot) rows() int {
	n := len(s.Segments) + len(s.Disks)
	for _, d := range s.Disks {
		n += len(d.Runs) + d.bootRows()
	}
	return n
}

// bootRows is how many rows a disk's boot profile counts for, by its length.
func (d *diskState) bootRows() int { return len(d.Boot) / 256 }

// cut deals the rows out to tables of at most max.
func (s *snapshot) cut(max int) []table {
	var all []table
	room := 0
	open := func() *table {
		if room <= 0 {
			all, room = append(all, table{}), max
		}
		room--
		return &all[len(all)-1]
	}
	for _, d := range s.Disks {
		runs := d.Runs
		d.Runs = nil
		t := open()
		t.Disks = append(t.Disks, d)
		room -= d.bootRows()
		d.Boot = nil
		for _, r := range runs {
			t := open()
			if len(t.Disks) == 0 {
				t.Disks = append(t.Disks, d)
			}
			last := &t.Disks[len(t.Disks)-1]
			last.Runs = append(last.Runs, r)
		}
	}
	for _, i := range s.Segments {
		t := open()
		t.Segments = append(t.Segments, i)
	}
	return all
}

// join adds the table that ref names, given the body of its part, to the snapshot.
func (s *snapshot) join(ref tableRef, body []byte) error {
	if int64(len(body)) != ref.Bytes || block.CRC(body) != ref.CRC {
		return fmt.Errorf("not the one that the manifest names: %w", segment.ErrDamaged)
	}
	t, err := decodeTable(body)
	if err != nil {
		return err
	}
	for _, d := range t.Disks {
		if n := len(s.Disks); n > 0 && s.Disks[n-1].Disk == d.Disk {
			s.Disks[n-1].Runs = append(s.Disks[n-1].Runs, d.Runs...)
			continue
		}
		s.Disks = append(s.Disks, d)
	}
	s.Segments = append(s.Segments, t.Segments...)
	return nil
}

func decodeTable(b []byte) (*table, error) {
	t := new(table)
	if err := json.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("table: %w", err)
	}
	return t, validSegments(t.Segments)
}
