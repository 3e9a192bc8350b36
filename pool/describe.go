package pool

import (
	"encoding/binary"
	"fmt"
	"io"

	"graindisk/block"
	"graindisk/grains/bootprofile"
	"graindisk/grains/extent"
	"graindisk/grains/segment"
	"graindisk/vdisk/densetree"
)

// Describe prints what a part of a published checkpoint holds: the manifest's disks and segments, or
// the runs. It fails with the errors of the decoders, after printing what it could read.
func Describe(w io.Writer, part []byte) error {
	if len(part) < partHeaderLen {
		return fmt.Errorf("checkpoint part of %d bytes: %w", len(part), segment.ErrDamaged)
	}
	le := binary.LittleEndian
	epoch, n, no := le.Uint64(part[16:]), le.Uint32(part[24:]), int(le.Uint32(part[28:]))
	body, err := decodePart(part, epoch, n, no)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "checkpoint   %d of epoch %d, part %d, %d bytes\n", n, epoch, no, len(body))
	if no > 0 && (len(body) == 0 || body[0] != '{') {
		return describeRuns(w, body)
	}
	if no > 0 {
		t, err := decodeTable(body)
		if err == nil {
			describeTable(w, t.Disks, t.Segments)
		}
		return err
	}
	s, err := decodeSnapshot(body)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "holds        cut %d, horizon %d, record crc %08x, next disk %d\n", s.Cut, s.Horizon, s.CutCRC, s.NextDisk)
	for _, t := range s.Tables {
		fmt.Fprintf(w, "table        in part %d, %d bytes, crc %08x\n", t.Part, t.Bytes, t.CRC)
	}
	describeTable(w, s.Disks, s.Segments)
	if s.Gone != nil {
		fmt.Fprintf(w, "gone         by cut %d: cuts %v, segments %v\n", s.GoneCut, s.Gone.Cuts, s.Gone.Segments)
	}
	for _, d := range s.Doomed {
		fmt.Fprintf(w, "doomed       %s, left out by checkpoint %d/%d, released at %d ms\n", d.name(), d.By.Epoch, d.By.N, d.Since)
	}
	for _, r := range s.Usage {
		fmt.Fprintf(w, "usage        at %d of part %d of checkpoint %d/%d, %d bytes\n", r.Off, r.Part, r.Epoch, r.N, r.Len)
	}
	return nil
}

func describeTable(w io.Writer, disks []diskState, segments []segment.Info) {
	for _, d := range disks {
		fmt.Fprintf(w, "disk         %d %q, %d bytes, %d runs\n", d.Disk, d.Meta.Name, d.Meta.SizeBytes, len(d.Runs))
		if d.Meta.Flags&segment.DiskDeleted != 0 {
			fmt.Fprintf(w, "  deleted    at %s, dropped: %v\n", stamp(d.Meta.DeletedAt), d.Meta.Flags&segment.DiskDropped != 0)
		}
		if len(d.Boot) > 0 {
			p, err := bootprofile.Decode(d.Boot)
			fmt.Fprintf(w, "  boot       %d ranges, %d bytes%s\n", len(p.Ranges), p.Blocks()*block.Size, because(err))
		}
		for _, r := range d.Runs {
			fmt.Fprintf(w, "  run        %d at %d of part %d of checkpoint %d/%d, %d bytes\n", r.ID, r.Off, r.Part, r.Epoch, r.N, r.Len)
		}
	}
	for _, i := range segments {
		fmt.Fprintf(w, "segment      %d-%d, %d+%d on targets %v, %d extents, %d bytes\n", i.ID, i.Epoch, i.K, i.M, i.Targets, i.Extents, i.PayloadBytes)
	}
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

// describeRuns prints the runs and the usage table in a body, which says nothing of their lengths: each
// begins with its own header.
func describeRuns(w io.Writer, body []byte) error {
	for off := 0; off < len(body); {
		if extent.IsBlob(body[off:]) {
			n, err := extent.BlobLen(body[off:])
			if err == nil {
				err = extent.DescribeBlob(w, body[off:off+n])
			}
			if err != nil {
				return err
			}
			off += n
			continue
		}
		n, err := densetree.RunLen(body[off:])
		if err != nil {
			return err
		}
		r, err := densetree.DecodeRun(body[off : off+n])
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "run          %d at %d, level %d, blocks %d to %d, %d entries, %d bytes\n", r.ID, off, r.Level, r.First, r.Last, r.Len(), n)
		off += n
	}
	return nil
}
