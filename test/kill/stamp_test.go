package kill

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"graindisk/block"
)

const (
	sectorBytes    = 512
	stampMagic     = 0x4b534447 // "GDSK"
	stampHeaderLen = 32
)

// errNotStamp means that a sector is neither zeroes nor a whole stamp of its place.
var errNotStamp = errors.New("not a stamp")

var zeroSector [sectorBytes]byte

// stamp fills p, whole sectors, as write id leaves them from sector first on.
func stamp(p []byte, id uint64, first int64) {
	le := binary.LittleEndian
	for ; len(p) > 0; p, first = p[sectorBytes:], first+1 {
		s := p[:sectorBytes]
		clear(s[:stampHeaderLen])
		le.PutUint32(s, stampMagic)
		le.PutUint64(s[8:], id)
		le.PutUint64(s[16:], uint64(first))
		x := id*0x9e3779b97f4a7c15 ^ uint64(first)*0xd1b54a32d192ed03
		for off := stampHeaderLen; off < sectorBytes; off += 8 {
			x = x*6364136223846793005 + 1442695040888963407
			le.PutUint64(s[off:], x)
		}
		le.PutUint32(s[24:], stampCRC(s))
	}
}

func stampCRC(s []byte) uint32 { return block.CRC(s[:24]) ^ block.CRC(s[28:]) }

// parse tells which write one sector is of; 0 is zeroes.
func parse(s []byte, sector int64) (id uint64, err error) {
	if [sectorBytes]byte(s) == zeroSector {
		return 0, nil
	}
	le := binary.LittleEndian
	id = le.Uint64(s[8:])
	switch at := int64(le.Uint64(s[16:])); {
	case le.Uint32(s) != stampMagic, id == 0:
		return 0, fmt.Errorf("%w: it begins with %x", errNotStamp, s[:16])
	case le.Uint32(s[24:]) != stampCRC(s):
		return 0, fmt.Errorf("%w: torn or damaged, it says write %d, sector %d", errNotStamp, id, at)
	case at != sector:
		return 0, fmt.Errorf("%w: it is sector %d of write %d", errNotStamp, at, id)
	}
	return id, nil
}

func TestStampOfAnotherPlaceOrTornIsRefused(t *testing.T) {
	p := make([]byte, 2*sectorBytes)
	stamp(p, 7, 100)
	for i := range int64(2) {
		if id, err := parse(p[i*sectorBytes:][:sectorBytes], 100+i); id != 7 || err != nil {
			t.Fatalf("sector %d: write %d, %v", i, id, err)
		}
	}
	if _, err := parse(p[:sectorBytes], 101); !errors.Is(err, errNotStamp) {
		t.Errorf("a sector in the wrong place: %v", err)
	}
	if id, err := parse(zeroSector[:], 5); id != 0 || err != nil {
		t.Errorf("zeroes: write %d, %v", id, err)
	}
	for off := range sectorBytes {
		torn := [sectorBytes]byte(p)
		torn[off] ^= 1
		if _, err := parse(torn[:], 100); !errors.Is(err, errNotStamp) {
			t.Fatalf("byte %d changed: %v", off, err)
		}
	}
}
