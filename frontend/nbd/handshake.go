package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"graindisk/frontend/nbd/proto"
	"graindisk/vdisk"
)

const (
	optionDataMax = 64 << 10 // of one option, bytes
	optionsMax    = 256      // of one handshake
)

// handshake greets the client and haggles until it has chosen an export, which is then open.
func (c *conn) handshake() error {
	var hello [proto.GreetingLen]byte
	binary.BigEndian.PutUint64(hello[:], proto.MagicServer)
	binary.BigEndian.PutUint64(hello[8:], proto.MagicOption)
	ours := proto.FlagFixedNewstyle | proto.FlagNoZeroes
	binary.BigEndian.PutUint16(hello[16:], ours)
	if _, err := c.stream.Write(hello[:]); err != nil {
		return err
	}
	p, err := c.in.next(4)
	if err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(p)
	if flags&^uint32(ours) != 0 {
		return fmt.Errorf("unknown client flags %#x", flags)
	}
	c.noZeroes = flags&uint32(proto.FlagNoZeroes) != 0
	for range optionsMax {
		opt, data, err := c.readOption()
		if err != nil {
			return err
		}
		chosen, err := c.answerOption(opt, data)
		if err != nil || chosen {
			return err
		}
	}
	return fmt.Errorf("more than %d options", optionsMax)
}

// readOption reads one option; data is the caller's.
func (c *conn) readOption() (opt uint32, data []byte, err error) {
	p, err := c.in.next(proto.OptionHeaderLen)
	if err != nil {
		return 0, nil, err
	}
	if magic := binary.BigEndian.Uint64(p); magic != proto.MagicOption {
		return 0, nil, fmt.Errorf("bad option magic %#016x", magic)
	}
	opt = binary.BigEndian.Uint32(p[8:])
	n := binary.BigEndian.Uint32(p[12:])
	if n > optionDataMax {
		return 0, nil, fmt.Errorf("option %d has %d bytes of data", opt, n)
	}
	data = make([]byte, n)
	return opt, data, c.in.full(data)
}

// answerOption answers one option; chosen means that transmission follows.
func (c *conn) answerOption(opt uint32, data []byte) (chosen bool, err error) {
	if answered, err := c.secure(opt, data); answered {
		return false, err
	}
	switch opt {
	case proto.OptExportName:
		return true, c.exportName(data)
	case proto.OptInfo, proto.OptGo:
		return c.info(opt, data)
	case proto.OptAbort:
		_ = c.reply(opt, proto.RepAck, nil) // the client need not wait for it
		return false, errBye
	case proto.OptList:
		if len(data) > 0 {
			return false, c.refuse(opt, proto.RepErrInvalid, "LIST takes no data")
		}
		return false, c.list()
	case proto.OptStructuredReply:
		if len(data) > 0 {
			return false, c.refuse(opt, proto.RepErrInvalid, "STRUCTURED_REPLY takes no data")
		}
		if c.extended {
			return false, c.refuse(opt, proto.RepErrExtHeaderReqd, "extended headers are in use")
		}
		c.structured = true
		return false, c.reply(opt, proto.RepAck, nil)
	case proto.OptExtendedHeaders:
		if len(data) > 0 {
			return false, c.refuse(opt, proto.RepErrInvalid, "EXTENDED_HEADERS takes no data")
		}
		c.structured, c.extended = true, true
		return false, c.reply(opt, proto.RepAck, nil)
	case proto.OptListMetaContext, proto.OptSetMetaContext:
		return false, c.metaContext(opt, data)
	}
	return false, c.refuse(opt, proto.RepErrUnsup, "option not supported")
}

// forgetHaggled forgets everything that options before STARTTLS have set: whatever plain text agreed
// on, somebody between client and server may have said. Every option with an effect belongs here.
func (c *conn) forgetHaggled() { c.structured, c.extended, c.contexts = false, false, contexts{} }

// list answers LIST.
func (c *conn) list() error {
	for _, name := range c.visible() {
		p := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		if err := c.reply(proto.OptList, proto.RepServer, append(p, name...)); err != nil {
			return err
		}
	}
	return c.reply(proto.OptList, proto.RepAck, nil)
}

// exportName answers EXPORT_NAME, whose only refusal is the end of the connection.
func (c *conn) exportName(data []byte) error {
	if c.extended {
		return errors.New("EXPORT_NAME after EXTENDED_HEADERS")
	}
	if err := c.open(string(data)); err != nil {
		return fmt.Errorf("open export %q: %w", data, err)
	}
	p := binary.BigEndian.AppendUint64(nil, uint64(c.dev.Size()))
	p = binary.BigEndian.AppendUint16(p, c.transmissionFlags())
	if !c.noZeroes {
		p = append(p, make([]byte, proto.ExportNameZeroesLen)...)
	}
	return c.releaseOnError(c.write(p))
}

// info answers INFO and GO.
func (c *conn) info(opt uint32, data []byte) (chosen bool, err error) {
	name, wants, ok := parseInfo(data)
	if !ok {
		return false, c.refuse(opt, proto.RepErrInvalid, "malformed request for information")
	}
	if err := c.open(name); err != nil {
		return false, c.refuseOpen(opt, name, err)
	}
	if opt == proto.OptInfo {
		defer c.release()
	}
	send := func(kind uint16, data []byte) {
		if err == nil {
			err = c.reply(opt, proto.RepInfo, append(binary.BigEndian.AppendUint16(nil, kind), data...))
		}
	}
	p := binary.BigEndian.AppendUint64(nil, uint64(c.dev.Size()))
	send(proto.InfoExport, binary.BigEndian.AppendUint16(p, c.transmissionFlags()))
	if slices.Contains(wants, proto.InfoName) {
		send(proto.InfoName, []byte(c.export))
	}
	if text := c.dev.Description(); text != "" && slices.Contains(wants, proto.InfoDescription) {
		send(proto.InfoDescription, []byte(text[:min(len(text), proto.NameMax)]))
	}
	if slices.Contains(wants, proto.InfoBlockSize) {
		p := binary.BigEndian.AppendUint32(nil, 1)
		p = binary.BigEndian.AppendUint32(p, blockSizePreferred)
		send(proto.InfoBlockSize, binary.BigEndian.AppendUint32(p, payloadMax))
	}
	if err == nil {
		err = c.reply(opt, proto.RepAck, nil)
	}
	if opt == proto.OptInfo {
		return false, err
	}
	return true, c.releaseOnError(err)
}

// parseInfo decodes the data of INFO and GO: u32 length, name, u16 count, count times u16.
func parseInfo(p []byte) (name string, wants []uint16, ok bool) {
	if len(p) < 6 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	if p = p[4:]; n > proto.NameMax || int(n) > len(p)-2 {
		return "", nil, false
	}
	name, p = string(p[:n]), p[n:]
	count := int(binary.BigEndian.Uint16(p))
	if p = p[2:]; len(p) != 2*count {
		return "", nil, false
	}
	for ; len(p) > 0; p = p[2:] {
		wants = append(wants, binary.BigEndian.Uint16(p))
	}
	return name, wants, true
}

// open opens the export of that name, "" being the only export there is.
func (c *conn) open(name string) error {
	if name == "" {
		if names := c.visible(); len(names) == 1 {
			name = names[0]
		}
	}
	if err := c.admit(name); err != nil {
		return err
	}
	dev, release, err := c.srv.opt.Exports.Open(c.ctx, name)
	if err != nil {
		return err
	}
	fast, ok := dev.(FastZeroer)
	c.dev, c.release, c.export = dev, release, name
	c.fastZero = ok && fast.FastZero()
	c.prompter, _ = dev.(Prompter)
	c.beginner, _ = dev.(Beginner)
	c.piecer, _ = dev.(Piecer)
	c.statuser, _ = dev.(Statuser)
	c.prefetcher, _ = dev.(Prefetcher)
	c.box.hold = nil
	if h, ok := dev.(Holder); ok {
		if err := h.Hold(c.ctx); err != nil {
			c.release()
			return err
		}
		c.box.hold = func() error { return h.Hold(c.ctx) }
	}
	return nil
}

// releaseOnError gives the export back if the handshake ends with it open.
func (c *conn) releaseOnError(err error) error {
	if err != nil {
		c.release()
	}
	return err
}

// transmissionFlags is what the open export offers.
func (c *conn) transmissionFlags() uint16 {
	flags := proto.FlagHasFlags | proto.FlagSendFlush | proto.FlagCanMultiConn
	if c.structured {
		flags |= proto.FlagSendDF
	}
	if c.prefetcher != nil {
		flags |= proto.FlagSendCache
	}
	if c.readOnly() {
		return flags | proto.FlagReadOnly
	}
	flags |= proto.FlagSendFUA | proto.FlagSendTrim | proto.FlagSendWriteZeroes
	if c.fastZero {
		flags |= proto.FlagSendFastZero
	}
	return flags
}

// refuseOpen answers an option whose export cannot be opened. What went wrong inside is for the
// log, not for a client.
func (c *conn) refuseOpen(opt uint32, name string, err error) error {
	switch {
	case errors.Is(err, ErrNotFound):
		return c.refuse(opt, proto.RepErrUnknown, "no such export")
	case errors.Is(err, vdisk.ErrClosed):
		return c.refuse(opt, proto.RepErrShutdown, "export is being closed")
	case errors.Is(err, vdisk.ErrFenced):
		return c.refuse(opt, proto.RepErrShutdown, "another gateway owns the pool of this export now")
	}
	c.log.Warn("export cannot be opened", "export", name, "error", err)
	return c.refuse(opt, proto.RepErrPolicy, "export cannot be opened; see the server's log")
}

func (c *conn) refuse(opt, code uint32, msg string) error {
	c.log.Debug("option refused", "option", opt, "code", code, "reason", msg)
	return c.reply(opt, code, []byte(msg))
}

// reply sends one option reply.
func (c *conn) reply(opt, typ uint32, data []byte) error {
	p := binary.BigEndian.AppendUint64(nil, proto.MagicOptionReply)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, typ)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return c.write(append(p, data...))
}

func (c *conn) write(p []byte) error {
	_, err := c.stream.Write(p)
	return err
}
