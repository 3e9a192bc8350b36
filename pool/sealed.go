package pool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"graindisk/block"
	"graindisk/pool/root"
)

// A sealed text is a JSON object that people can read as it stands and programs can trust:
//
//	{"magic":"graindisk beat","format":1,
//	...                               the fields of the value, as encoding/json writes them
//	"crc":"89abcdef"}                 CRC32C of every byte before "crc", eight hex digits, and a newline
//
// The first line and the last stay where they are in every later format. A reader ignores fields that it does
// not know; what it must not ignore raises the format.
const (
	sealHead = `{"magic":"%s","format":`
	sealCRC  = "\n\"crc\":\"%08x\"}\n"
)

// What a reader of a sealed text may meet.
var (
	errSealBroken = errors.New("not whole")
	errSealNewer  = errors.New("written by a newer release; upgrade this gateway")
)

// seal encodes v, which must be a struct with fields.
func seal(magic string, format int, v any) ([]byte, error) {
	enc, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", magic, err)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, sealHead+"%d,\n", magic, format)
	b.Write(enc[1 : len(enc)-1])
	b.WriteString(",")
	fmt.Fprintf(&b, sealCRC, block.CRC(b.Bytes()))
	return b.Bytes(), nil
}

// unseal decodes what seal wrote into v, or fails with errSealBroken or errSealNewer.
func unseal(magic string, format int, b []byte, v any) error {
	tail := len(fmt.Sprintf(sealCRC, 0))
	if !bytes.HasPrefix(b, fmt.Appendf(nil, sealHead, magic)) || len(b) < tail {
		return fmt.Errorf("%w: no %s", errSealBroken, magic)
	}
	front := b[:len(b)-tail]
	if string(b[len(front):]) != fmt.Sprintf(sealCRC, block.CRC(front)) {
		return fmt.Errorf("%w: the checksum of the %s does not match", errSealBroken, magic)
	}
	var env struct {
		Magic  string `json:"magic"`
		Format int    `json:"format"`
	}
	if err := json.Unmarshal(b, &env); err != nil {
		return fmt.Errorf("%w: %s: %w", errSealBroken, magic, err)
	}
	switch {
	case env.Magic != magic || env.Format < 1:
		return fmt.Errorf("%w: magic %q, format %d", errSealBroken, env.Magic, env.Format)
	case env.Format > format:
		return fmt.Errorf("%s of format %d, this release knows %d: %w: %w", magic, env.Format, format, errSealNewer, root.ErrNewer)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %s: %w", errSealBroken, magic, err)
	}
	return nil
}
