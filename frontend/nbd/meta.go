package nbd

import (
	"encoding/binary"
	"slices"
	"strings"

	"graindisk/frontend/nbd/proto"
)

// contexts are the metadata contexts that SET_META_CONTEXT has chosen. There is only one to choose.
type contexts struct {
	export     string // for which they were chosen
	allocation bool
}

// allocationID is the number of base:allocation on the wire.
const allocationID = 1

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (c *conn) metaContext(opt uint32, data []byte) error {
	set := opt == proto.OptSetMetaContext
	if set {
		c.contexts = contexts{} // a request that fails chooses nothing
	}
	if !c.structured {
		return c.refuse(opt, proto.RepErrInvalid, "metadata contexts need structured replies")
	}
	name, queries, ok := parseMeta(data)
	if !ok {
		return c.refuse(opt, proto.RepErrInvalid, "malformed request for metadata contexts")
	}
	if err := c.open(name); err != nil {
		return c.refuseOpen(opt, name, err)
	}
	has := c.statuser != nil
	c.release()
	match := slices.Contains(queries, proto.ContextAllocation)
	if !set {
		match = match || len(queries) == 0 || slices.Contains(queries, "base:")
	}
	if has && match {
		id := uint32(0)
		if set {
			c.contexts, id = contexts{c.export, true}, allocationID
		}
		if err := c.reply(opt, proto.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), proto.ContextAllocation...)); err != nil {
			return err
		}
	}
	return c.reply(opt, proto.RepAck, nil)
}

// parseMeta decodes the data of both: u32 length, name, u32 count, count times u32 length and query. A
// query names a namespace, which ends at a colon.
func parseMeta(p []byte) (name string, queries []string, ok bool) {
	text := func() (s string, ok bool) {
		if len(p) < 4 {
			return "", false
		}
		n := binary.BigEndian.Uint32(p)
		if p = p[4:]; n > proto.NameMax || int(n) > len(p) {
			return "", false
		}
		s, p = string(p[:n]), p[n:]
		return s, true
	}
	if name, ok = text(); !ok || len(p) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(p)
	p = p[4:]
	for range count { // each takes four bytes of p at least
		q, ok := text()
		if !ok || !strings.Contains(q, ":") {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(p) == 0
}
