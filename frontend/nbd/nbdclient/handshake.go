package nbdclient

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"

	"graindisk/frontend/nbd/proto"
)

// RefusedError is a server's refusal of an option, such as GO for an export it does not have.
type RefusedError struct {
	Option, Code uint32 // proto.Opt..., proto.RepErr...
	Message      string // of the server; may be empty
}

func (e *RefusedError) Error() string {
	if e.Code == proto.RepErrUnknown {
		return "server has no such export"
	}
	return fmt.Sprintf("server refused option %d with error %d: %q", e.Option, e.Code&^proto.RepErr, e.Message)
}

// optionReplyMax bounds what one option reply may carry, bytes.
const optionReplyMax = 64 << 10

// handshake is the client's side of option haggling.
type handshake struct {
	r    *bufio.Reader
	sock net.Conn // what is written to: the socket, or TLS over it
	info Info
}

func (h *handshake) run(ctx context.Context, export string, o Options) error {
	var p [proto.GreetingLen]byte
	if _, err := io.ReadFull(h.r, p[:]); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	flags := binary.BigEndian.Uint16(p[16:])
	if binary.BigEndian.Uint64(p[:]) != proto.MagicServer || binary.BigEndian.Uint64(p[8:]) != proto.MagicOption ||
		flags&proto.FlagFixedNewstyle == 0 {
		return fmt.Errorf("not a fixed newstyle nbd server: greeting %x", p)
	}
	ours := uint32(flags & (proto.FlagFixedNewstyle | proto.FlagNoZeroes))
	if _, err := h.sock.Write(binary.BigEndian.AppendUint32(nil, ours)); err != nil {
		return err
	}
	if o.TLS != nil {
		if err := h.startTLS(ctx, o.TLS); err != nil {
			return err
		}
	}
	var err error
	if o.Extended {
		if h.info.Extended, err = h.ask(proto.OptExtendedHeaders, nil, nil); err != nil {
			return err
		}
		h.info.Structured = h.info.Extended
	}
	if !o.SimpleReplies && !h.info.Extended {
		if h.info.Structured, err = h.ask(proto.OptStructuredReply, nil, nil); err != nil {
			return err
		}
	}
	if o.Allocation && h.info.Structured {
		if err := h.askAllocation(export); err != nil {
			return err
		}
	}
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	wants := []uint16{proto.InfoName, proto.InfoDescription, proto.InfoBlockSize}
	data = binary.BigEndian.AppendUint16(data, uint16(len(wants)))
	for _, want := range wants {
		data = binary.BigEndian.AppendUint16(data, want)
	}
	h.info.Size = -1
	if err := h.option(proto.OptGo, data, h.takeInfo); err != nil {
		return err
	}
	if h.info.Size < 0 {
		return fmt.Errorf("server did not tell the size of the export")
	}
	return nil
}

// startTLS goes over to TLS. Plain text after the server's answer can only be a stranger's.
func (h *handshake) startTLS(ctx context.Context, conf *tls.Config) error {
	if err := h.option(proto.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if n := h.r.Buffered(); n > 0 {
		return fmt.Errorf("%d bytes of plain text after the answer to STARTTLS", n)
	}
	sock := tls.Client(h.sock, conf)
	if err := sock.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	h.sock, h.r = sock, bufio.NewReaderSize(sock, 64<<10)
	return nil
}

// ask sends an option that the server may not know, and reports whether it does.
func (h *handshake) ask(opt uint32, data []byte, reply func(typ uint32, data []byte) error) (bool, error) {
	err := h.option(opt, data, reply)
	if refused, ok := err.(*RefusedError); ok && refused.Code == proto.RepErrUnsup {
		return false, nil
	}
	return err == nil, err
}

// askAllocation chooses base:allocation.
func (h *handshake) askAllocation(export string) error {
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = binary.BigEndian.AppendUint32(data, 1)
	data = binary.BigEndian.AppendUint32(data, uint32(len(proto.ContextAllocation)))
	_, err := h.ask(proto.OptSetMetaContext, append(data, proto.ContextAllocation...), func(typ uint32, data []byte) error {
		if typ != proto.RepMetaContext || len(data) < 4 || string(data[4:]) != proto.ContextAllocation {
			return fmt.Errorf("server chose metadata context %q", data)
		}
		h.info.Allocation = true
		return nil
	})
	return err
}

// option sends one option and gives what the server tells before its final reply to told.
func (h *handshake) option(opt uint32, data []byte, told func(typ uint32, data []byte) error) error {
	p := binary.BigEndian.AppendUint64(nil, proto.MagicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	if _, err := h.sock.Write(append(p, data...)); err != nil {
		return err
	}
	for {
		typ, data, err := h.reply(opt)
		switch {
		case err != nil:
			return err
		case typ == proto.RepAck:
			return nil
		case typ&proto.RepErr != 0:
			return &RefusedError{Option: opt, Code: typ, Message: string(data)}
		case told == nil:
			return fmt.Errorf("unexpected reply %d to option %d", typ, opt)
		}
		if err := told(typ, data); err != nil {
			return err
		}
	}
}

func (h *handshake) reply(opt uint32) (typ uint32, data []byte, err error) {
	var p [proto.OptionReplyLen]byte
	if _, err := io.ReadFull(h.r, p[:]); err != nil {
		return 0, nil, fmt.Errorf("reply to option %d: %w", opt, err)
	}
	n := binary.BigEndian.Uint32(p[16:])
	if binary.BigEndian.Uint64(p[:]) != proto.MagicOptionReply || binary.BigEndian.Uint32(p[8:]) != opt || n > optionReplyMax {
		return 0, nil, fmt.Errorf("malformed reply to option %d: %x", opt, p)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return 0, nil, fmt.Errorf("reply to option %d: %w", opt, err)
	}
	return binary.BigEndian.Uint32(p[12:]), data, nil
}

// takeInfo takes one NBD_REP_INFO; unknown kinds are ignored, as the protocol asks.
func (h *handshake) takeInfo(typ uint32, p []byte) error {
	if typ != proto.RepInfo || len(p) < 2 {
		return fmt.Errorf("unexpected reply %d with %d bytes to option %d", typ, len(p), proto.OptGo)
	}
	kind, p := binary.BigEndian.Uint16(p), p[2:]
	switch {
	case kind == proto.InfoExport && len(p) == 10:
		h.info.Size = int64(binary.BigEndian.Uint64(p))
		h.info.Flags = binary.BigEndian.Uint16(p[8:])
	case kind == proto.InfoName:
		h.info.Export = string(p)
	case kind == proto.InfoDescription:
		h.info.Description = string(p)
	case kind == proto.InfoBlockSize && len(p) == 12:
		h.info.BlockMin = binary.BigEndian.Uint32(p)
		h.info.BlockPreferred = binary.BigEndian.Uint32(p[4:])
		h.info.PayloadMax = binary.BigEndian.Uint32(p[8:])
	case kind == proto.InfoExport || kind == proto.InfoBlockSize:
		return fmt.Errorf("information %d has %d bytes", kind, len(p))
	}
	return nil
}
