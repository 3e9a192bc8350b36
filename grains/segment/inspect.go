package segment

import (
	"encoding/hex"
	"fmt"
	"io"

	"graindisk/block"
)

// Report is what can be told of one shard object, for people and for --json. Parts that do not decode
// are absent and named in Problems.
type Report struct {
	Bytes    int        `json:"bytes"`
	Pool     string     `json:"pool,omitempty"` // hexadecimal
	Shard    int        `json:"shard"`
	Info     *Info      `json:"info,omitempty"` // from the trailer: targets as planned at sealing
	Cut      uint64     `json:"cut,omitempty"`
	Salt     string     `json:"salt,omitempty"` // hexadecimal
	Extents  []Entry    `json:"extents,omitempty"`
	CutData  *CutRecord `json:"cut_record,omitempty"`
	CutCRC   uint32     `json:"cut_crc,omitempty"`
	Problems []string   `json:"problems,omitempty"`
}

// Inspect decodes as much of a shard object as is intact. The error, if any, is that of OpenShard:
// the first reason not to trust the object.
func Inspect(b []byte) (*Report, error) {
	r := &Report{Bytes: len(b)}
	t, err := DecodeTrailer(b)
	r.note(err)
	if h, err := DecodeHeader(b); err != nil {
		r.note(err)
	} else {
		r.Pool, r.Shard, r.Salt = hex.EncodeToString(h.Pool[:]), int(h.Shard), hex.EncodeToString(h.Salt[:])
	}
	if err == nil {
		r.Info, r.Cut, r.Shard, r.CutCRC, r.Pool = &t.Info, t.Cut, int(t.Shard), t.CutCRC, hex.EncodeToString(t.Pool[:])
		if int64(len(b)) == t.Info.ObjectBytes() {
			r.inspectParts(b, t)
		}
	}
	_, err = OpenShard(b)
	if err != nil && len(r.Problems) == 0 {
		r.note(err)
	}
	return r, err
}

// inspectParts looks at what the trailer locates in an object of the right size.
func (r *Report) inspectParts(b []byte, t Trailer) {
	area := b[HeaderBytes:t.Info.indexOffset()]
	if block.CRC(area) != t.AreaCRC {
		r.note(fmt.Errorf("extents area fails its checksum"))
	}
	x, err := DecodeIndex(b[t.Info.indexOffset():t.Info.cutOffset()])
	if r.note(err); err == nil {
		r.Extents = x.Entries
		s := &Shard{Trailer: t, Index: x, Area: area}
		if err := x.describes(t.Info); err != nil {
			r.note(err)
		} else {
			r.note(s.checkExtents())
		}
	}
	if t.Info.CutBytes > 0 {
		r.CutData, err = DecodeCutRecord(b[t.Info.cutOffset():t.Info.trailerOffset()])
		r.note(err)
	}
}

func (r *Report) note(err error) {
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
}

// Describe writes what Inspect finds as text and returns its error.
func Describe(w io.Writer, shard []byte) error {
	r, err := Inspect(shard)
	p := &printer{w: w}
	p.line("shard object, %d bytes", r.Bytes)
	if i := r.Info; i != nil {
		p.line("segment %d epoch %d, shard %d of %d+%d, pool %s, targets %v", i.ID, i.Epoch, r.Shard, i.K, i.M, r.Pool, i.Targets)
		p.line("area %d bytes, index %d, cut record %d; %d extents, %d bytes of data", i.ShardBytes, i.IndexBytes, i.CutBytes, i.Extents, i.PayloadBytes)
	}
	for slot, e := range r.Extents {
		p.line("slot %d name %v disk %d lba %d blocks %d seq %d shard %d offset %d stored %d codec %d crc %08x",
			slot, e.Name, e.Disk, e.LBA, e.Blocks, e.Seq, e.Shard, e.Offset, e.Stored, e.Codec, e.CRC)
	}
	if c := r.CutData; c != nil {
		p.cut(c, r.CutCRC)
	}
	for _, s := range r.Problems {
		p.line("problem: %s", s)
	}
	if p.err != nil {
		return fmt.Errorf("describe shard: %w", p.err)
	}
	return err
}

// printer writes lines and keeps the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

func (p *printer) cut(c *CutRecord, crc uint32) {
	p.line("cut %d epoch %d horizon %d time %d crc %08x, after cut %d crc %08x", c.Cut, c.Epoch, c.Horizon, c.Time, crc, c.PrevCut, c.PrevCRC)
	for _, i := range c.Segments {
		p.line("  with segment %d epoch %d %d+%d, %d extents, targets %v", i.ID, i.Epoch, i.K, i.M, i.Extents, i.Targets)
	}
	for _, d := range c.Disks {
		if m := d.Meta; m != nil {
			p.line("  disk %d is %q, %d bytes, flags %#x, parent %d, base %d", d.Disk, m.Name, m.SizeBytes, m.Flags, m.Parent, m.BaseVersion)
			if m.DeletedAt != 0 {
				p.line("    deleted at %d s", m.DeletedAt)
			}
		}
		for _, u := range d.Unmaps {
			p.line("  disk %d unmap %d blocks at %d", d.Disk, u.Blocks, u.LBA)
		}
	}
}
