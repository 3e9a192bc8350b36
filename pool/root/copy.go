package root

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"graindisk/block"
)

// Key is the key of the root at every target.
const Key = "root"

// bytesMax bounds a copy: 256 cuts of about 250 bytes and two checkpoints are far below.
const bytesMax = 1 << 20

// format is the copy format this release writes; it knows no incompat bit.
const format = 1

const magic = "graindisk root"

// The ends of every copy in every format.
const (
	head      = `{"magic":"` + magic + `","format":`
	crcHead   = `"crc":"`
	crcTail   = "\"}\n"
	crcDigits = 8
	tailBytes = len(crcHead) + crcDigits + len(crcTail)
)

// Copy is what one member holds.
type Copy struct {
	Pool     string `json:"pool"`
	Member   string `json:"member"` // uuid
	Promised Ballot `json:"promised"`
	Accepted Ballot `json:"accepted"`
	Ver      uint64 `json:"ver"` // of the value, from 1; rises along a tenure and from tenure to tenure; 0: Seeded
	Val      Value  `json:"value"`
	Nonce    string `json:"nonce"`
}

// compareAccepted orders what o accepted against (b, ver).
func (o Copy) compareAccepted(b Ballot, ver uint64) int {
	if c := o.Accepted.Compare(b); c != 0 {
		return c
	}
	switch {
	case o.Ver < ver:
		return -1
	case o.Ver > ver:
		return 1
	}
	return 0
}

// encode is the copy's body.
func (o Copy) encode() ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s%d,\"incompat\":0", head, format)
	for _, f := range []struct {
		name string // with what goes before it
		val  any
	}{
		{",\n\"pool\":", o.Pool},
		{",\"member\":", o.Member},
		{",\n\"promised\":", o.Promised},
		{",\n\"accepted\":", o.Accepted},
		{",\"ver\":", o.Ver},
		{",\n\"value\":", o.Val},
		{",\n\"nonce\":", o.Nonce},
	} {
		enc, err := json.Marshal(f.val)
		if err != nil {
			return nil, fmt.Errorf("encode root copy: %w", err)
		}
		b.WriteString(f.name)
		b.Write(enc)
	}
	b.WriteString(",\n")
	fmt.Fprintf(&b, "%s%08x%s", crcHead, block.CRC(b.Bytes()), crcTail)
	if b.Len() > bytesMax {
		return nil, fmt.Errorf("encode root copy: %d bytes, at most %d", b.Len(), bytesMax)
	}
	return b.Bytes(), nil
}

// Decode reads a copy, or fails with ErrDamaged or ErrNewer.
func Decode(body []byte) (Copy, error) {
	if err := checkEnds(body); err != nil {
		return Copy{}, err
	}
	var c struct {
		envelope
		Copy
		CRC string `json:"crc"`
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		var env envelope // a newer format may have fields of any kind
		if json.Unmarshal(body, &env) == nil && env.check() != nil {
			return Copy{}, env.check()
		}
		return Copy{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := c.check(); err != nil {
		return Copy{}, err
	}
	if c.Pool == "" || c.Member == "" || c.Accepted.Compare(c.Promised) > 0 {
		return Copy{}, fmt.Errorf("%w: pool %q, member %q, accepted epoch %d, promised %d",
			ErrDamaged, c.Pool, c.Member, c.Accepted.Epoch, c.Promised.Epoch)
	}
	if c.Seeded() && c.Accepted != (Ballot{}) {
		return Copy{}, fmt.Errorf("%w: version 0 accepted in epoch %d", ErrDamaged, c.Accepted.Epoch)
	}
	if err := c.Val.validate(); errors.Is(err, ErrNewer) {
		return Copy{}, err
	} else if err != nil {
		return Copy{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return c.Copy, nil
}

// envelope is what every format keeps.
type envelope struct {
	Magic    string `json:"magic"`
	Format   uint64 `json:"format"`
	Incompat uint64 `json:"incompat"`
}

func (e envelope) check() error {
	switch {
	case e.Magic != magic || e.Format == 0:
		return fmt.Errorf("%w: magic %q, format %d", ErrDamaged, e.Magic, e.Format)
	case e.Format > format:
		return fmt.Errorf("%w: format %d, this release knows %d; upgrade this gateway", ErrNewer, e.Format, format)
	case e.Incompat != 0:
		return fmt.Errorf("%w: incompatible features %#x, this release knows none; upgrade this gateway", ErrNewer, e.Incompat)
	}
	return nil
}

// checkEnds proves that body is whole, of whatever format.
func checkEnds(body []byte) error {
	if len(body) > bytesMax || len(body) < len(head)+tailBytes || !bytes.HasPrefix(body, []byte(head)) {
		return fmt.Errorf("%w: not a root copy", ErrDamaged)
	}
	front, tail := body[:len(body)-tailBytes], body[len(body)-tailBytes:]
	if !bytes.HasPrefix(tail, []byte(crcHead)) || !bytes.HasSuffix(tail, []byte(crcTail)) {
		return fmt.Errorf("%w: no checksum at its end", ErrDamaged)
	}
	if want := fmt.Sprintf("%08x", block.CRC(front)); string(tail[len(crcHead):len(crcHead)+crcDigits]) != want {
		return fmt.Errorf("%w: checksum does not match", ErrDamaged)
	}
	return nil
}

// Describe prints a copy for people.
func Describe(w io.Writer, body []byte) error {
	c, err := Decode(body)
	if err != nil {
		return err
	}
	v := c.Val
	var b bytes.Buffer
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s "+format+"\n", append([]any{name}, args...)...)
	}
	ballot := func(b Ballot) string { return "epoch " + strconv.FormatUint(b.Epoch, 10) + " by " + b.Claimant }
	line("root", "format %d, pool %s, copy of member %s", format, c.Pool, c.Member)
	line("promised", "%s", ballot(c.Promised))
	if c.Seeded() {
		line("accepted", "nothing yet: the seed of a new member; what follows was never committed")
	} else {
		line("accepted", "%s, version %d", ballot(c.Accepted), c.Ver)
	}
	line("state", "%s, owner %q on %q", v.State, v.Owner, v.OwnerName)
	line("published", "cut %d, horizon %d, record crc %08x", v.Cut, v.Horizon, v.LastCRC)
	line("layout", "stripe %d+%d, grain %d bytes, segment %d bytes, segment limit %d",
		v.Stripe.Data, v.Stripe.Parity, v.GrainBytes, v.SegmentBytes, v.SegLimit)
	describeMembers(line, "member", v.Cfg.No, v.Cfg.Members)
	describeMembers(line, "next member", v.Cfg.No, v.Cfg.Next)
	for _, k := range v.Checkpoints {
		line("checkpoint", "%d/%d through cut %d, %d+%d on targets %v, %d bytes, crc %08x",
			k.Epoch, k.N, k.Cut, k.K, k.M, k.Targets, k.Bytes, k.CRC)
	}
	for _, k := range v.Cuts {
		s := k.Segment
		line("cut", "%d in segment %d-%d, %d+%d on targets %v, shard %d, index %d, record %d bytes, crc %08x",
			k.Cut, s.ID, s.Epoch, s.K, s.M, s.Targets, s.ShardBytes, s.IndexBytes, s.RecordBytes, s.CRC)
	}
	if len(v.Params) > 0 {
		line("params", "%s", v.Params)
	}
	_, err = w.Write(b.Bytes())
	return err
}

func describeMembers(line func(name, format string, args ...any), what string, no uint64, ms []Member) {
	for _, m := range ms {
		witness := ""
		if m.Witness {
			witness = ", witness"
		}
		line(what, "%d %q %s (config %d%s)", m.ID, m.Name, m.UUID, no, witness)
	}
}
