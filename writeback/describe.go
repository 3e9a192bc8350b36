package writeback

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"graindisk/block"
	"graindisk/internal/vfs"
)

// Describe prints what the files of a log's folder say, for people. It opens nothing for service,
// changes nothing, and goes on past what it cannot read, which it names.
func Describe(w io.Writer, fsys vfs.FS, dir string) error {
	if _, err := readIdentity(fsys, dir); errors.Is(err, ErrNoLog) {
		return fmt.Errorf("%w; the log of a pool is in a folder of its own below the tier", err)
	}
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("inspect log: %w", err)
	}
	for _, e := range names {
		name := e.Name()
		var describe func(io.Writer, []byte) error
		_, isMeta := parseMetaName(name)
		switch {
		case name == identityName:
			describe = describeIdentity
		case name == ckptName(0) || name == ckptName(1):
			describe = describeCkpt
		case isMeta:
			describe = describeMeta
		case isSlot(name):
			describe = describeSlot
		default:
			continue
		}
		b, err := readAll(fsys, path.Join(dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("inspect log: %w", err)
		}
		fmt.Fprintf(w, "%s: ", name)
		if err := describe(w, b); err != nil {
			fmt.Fprintf(w, "%v\n", err)
		}
	}
	return nil
}

func isSlot(name string) bool {
	ok, _ := path.Match("slot-[0-9][0-9][0-9][0-9][0-9][0-9]", name)
	return ok
}

func describeIdentity(w io.Writer, b []byte) error {
	id, err := decodeIdentity(b)
	if err == nil {
		fmt.Fprintf(w, "log %s of pool %s\n", id.log, id.pool)
	}
	return err
}

func describeCkpt(w io.Writer, b []byte) error {
	h, x, state, err := parseCkpt(b, checksums{})
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "checkpoint %d through %d, replay from %s, %d bytes of state, term %s goes on with file %d at %d\n",
		h.generation, h.seq, metaName(h.firstMeta), len(state), x.pos.term, x.pos.file, x.pos.seq)
	for _, f := range x.files {
		fmt.Fprintf(w, "  file %d in slot %d: records %d to %d\n", f.file, f.slot, f.first, f.last)
	}
	for _, g := range x.gens {
		fmt.Fprintf(w, "  generation through %d: %d bytes on %d disks, %d operations\n", g.last, g.dirty().Bytes, len(g.disks), len(g.ops))
	}
	return nil
}

func describeMeta(w io.Writer, b []byte) error {
	h, err := decodeMetaHeader(b)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "metadata log %d after %d, term %s, from record %d\n", h.number, h.previous, h.term, h.first)
	for off := block.Size; off < len(b); {
		m, n, err := decodeMetaRecord(b[off:], int64(off), h.term.seed())
		if err != nil {
			fmt.Fprintf(w, "  %d: %v\n", off, err)
			off += block.Size
			continue
		}
		fmt.Fprintf(w, "  %d: record %d: %s\n", off, m.seq, describeRecord(m))
		off += n
	}
	return nil
}

func describeRecord(m metaRecord) string {
	switch m.kind {
	case metaTerm:
		if p, err := decodePosition(m.payload); err == nil {
			return fmt.Sprintf("term %s from file %d, record %d", p.term, p.file, p.seq)
		}
	case metaSealed:
		if s, err := decodeSealed(m.payload); err == nil {
			return fmt.Sprintf("sealed file %d in slot %d, %d blocks, records %d to %d", s.file, s.slot, s.end, s.first, s.last())
		}
	}
	return fmt.Sprintf("kind %d, %d bytes", m.kind, len(m.payload))
}

func describeSlot(w io.Writer, b []byte) error {
	h, err := decodeFileHeader(b)
	if err != nil {
		return fmt.Errorf("no log file: %w", err)
	}
	fmt.Fprintf(w, "log file %d of term %s, from record %d, stable %d\n", h.file, h.term, h.first, h.stable)
	for at := 1; at < len(b)/block.Size; {
		x, err := decodeBatchHeader(b[at*block.Size:], h.term)
		if err != nil || x.file != h.file || int(x.offset) != at {
			at++
			continue
		}
		state := "whole"
		payload := b[(at+int(x.headerBlocks))*block.Size:]
		if uint64(x.payload)*block.Size > uint64(len(payload)) || !x.holds(payload) {
			state = "payload bad"
		}
		fmt.Fprintf(w, "  %d: batch of records %d to %d, %d + %d blocks, stable %d, %s\n",
			at, x.first, x.last(), x.headerBlocks, x.payload, x.stable, state)
		for i, e := range x.entries {
			if e.kind == Op {
				fmt.Fprintf(w, "    %d: op on disk %d, %d bytes\n", x.first+Seq(i), e.disk, e.lba)
				continue
			}
			fmt.Fprintf(w, "    %d: %v disk %d, %d blocks at %d\n", x.first+Seq(i), e.kind, e.disk, e.blocks, e.lba)
		}
		at += int(x.headerBlocks)
		if state == "whole" {
			at += int(x.payload)
		}
	}
	return nil
}
