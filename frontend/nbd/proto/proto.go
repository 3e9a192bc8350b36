// Package proto holds the numbers of the NBD protocol that the server and the client share, and
// its error codes. All integers on the wire are big-endian. Where go-nbd names a number, it is
// taken from there; the others follow the protocol text of the NBD project (doc/proto.md).
package proto

import (
	"fmt"

	gonbd "github.com/pojntfx/go-nbd/pkg/protocol"
)

// Magic numbers that open each kind of message.
const (
	MagicServer          = gonbd.NEGOTIATION_MAGIC_OLDSTYLE // "NBDMAGIC", the server's first bytes
	MagicOption          = gonbd.NEGOTIATION_MAGIC_OPTION   // "IHAVEOPT", greeting and every option
	MagicOptionReply     = gonbd.NEGOTIATION_MAGIC_REPLY
	MagicRequest         = gonbd.TRANSMISSION_MAGIC_REQUEST
	MagicSimpleReply     = gonbd.TRANSMISSION_MAGIC_REPLY
	MagicStructuredReply = uint32(0x668e33ef)
	MagicExtendedRequest = uint32(0x21e41c71)
	MagicExtendedReply   = uint32(0x6e8a278c)
)

// Lengths of the fixed parts of messages, in bytes.
const (
	GreetingLen         = 18 // magic, magic, u16 handshake flags
	OptionHeaderLen     = 16 // magic, u32 option, u32 length
	OptionReplyLen      = 20 // magic, u32 option, u32 type, u32 length
	RequestLen          = 28 // magic, u16 flags, u16 type, u64 cookie, u64 offset, u32 length
	SimpleReplyLen      = 16 // magic, u32 error, u64 cookie
	StructuredReplyLen  = 20 // magic, u16 flags, u16 type, u64 cookie, u32 length
	ExtendedRequestLen  = 32 // magic, u16 flags, u16 type, u64 cookie, u64 offset, u64 length
	ExtendedReplyLen    = 32 // magic, u16 flags, u16 type, u64 cookie, u64 offset, u64 length
	ExportNameZeroesLen = 124
)

// Limits every peer may rely on.
const (
	PayloadMax = 32 << 20 // largest payload of one READ or WRITE
	NameMax    = 4096     // longest string
)

// Handshake flags of the server; the client answers with the same bits in 32 bits.
const (
	FlagFixedNewstyle = gonbd.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	FlagNoZeroes      = uint16(1 << 1)
)

// Options.
const (
	OptExportName      = uint32(1)
	OptAbort           = gonbd.NEGOTIATION_ID_OPTION_ABORT
	OptList            = gonbd.NEGOTIATION_ID_OPTION_LIST
	OptStartTLS        = uint32(5)
	OptInfo            = gonbd.NEGOTIATION_ID_OPTION_INFO
	OptGo              = gonbd.NEGOTIATION_ID_OPTION_GO
	OptStructuredReply = uint32(8)
	OptListMetaContext = uint32(9)
	OptSetMetaContext  = uint32(10)
	OptExtendedHeaders = uint32(11)
)

// Option reply types; bit 31 marks an error.
const (
	RepAck         = gonbd.NEGOTIATION_TYPE_REPLY_ACK
	RepServer      = gonbd.NEGOTIATION_TYPE_REPLY_SERVER
	RepInfo        = gonbd.NEGOTIATION_TYPE_REPLY_INFO
	RepMetaContext = uint32(4)
	RepErr         = uint32(1 << 31)
	RepErrUnsup    = gonbd.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	RepErrPolicy   = RepErr | 2
	RepErrInvalid  = RepErr | 3
	RepErrUnknown  = gonbd.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	RepErrTLSReqd  = RepErr | 5
	RepErrShutdown = RepErr | 7
	// RepErrExtHeaderReqd refuses what extended headers rule out, such as STRUCTURED_REPLY after them.
	RepErrExtHeaderReqd = RepErr | 10
)

// Information types of INFO and GO.
const (
	InfoExport      = gonbd.NEGOTIATION_TYPE_INFO_EXPORT
	InfoName        = gonbd.NEGOTIATION_TYPE_INFO_NAME
	InfoDescription = gonbd.NEGOTIATION_TYPE_INFO_DESCRIPTION
	InfoBlockSize   = gonbd.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Transmission flags of an export.
const (
	FlagHasFlags        = gonbd.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	FlagReadOnly        = uint16(1 << 1)
	FlagSendFlush       = uint16(1 << 2)
	FlagSendFUA         = uint16(1 << 3)
	FlagSendTrim        = uint16(1 << 5)
	FlagSendWriteZeroes = uint16(1 << 6)
	FlagSendDF          = uint16(1 << 7)
	FlagCanMultiConn    = gonbd.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	FlagSendCache       = uint16(1 << 10)
	FlagSendFastZero    = uint16(1 << 11)
)

// ContextAllocation is the metadata context that tells what of an export is allocated, and its states.
const (
	ContextAllocation = "base:allocation"
	StateHole         = uint32(1 << 0) // not stored
	StateZero         = uint32(1 << 1) // reads as zeroes
)

// Cmd is the type of a request.
type Cmd uint16

// Request types.
const (
	CmdRead        = Cmd(gonbd.TRANSMISSION_TYPE_REQUEST_READ)
	CmdWrite       = Cmd(gonbd.TRANSMISSION_TYPE_REQUEST_WRITE)
	CmdDisc        = Cmd(gonbd.TRANSMISSION_TYPE_REQUEST_DISC)
	CmdFlush       = Cmd(3)
	CmdTrim        = Cmd(4)
	CmdCache       = Cmd(5)
	CmdWriteZeroes = Cmd(6)
	CmdBlockStatus = Cmd(7)
)

// String is the request's name in lower case, as metrics label it.
func (c Cmd) String() string {
	switch c {
	case CmdRead:
		return "read"
	case CmdWrite:
		return "write"
	case CmdDisc:
		return "disc"
	case CmdFlush:
		return "flush"
	case CmdTrim:
		return "trim"
	case CmdCache:
		return "cache"
	case CmdWriteZeroes:
		return "write_zeroes"
	case CmdBlockStatus:
		return "block_status"
	}
	return "unknown"
}

// Request flags.
const (
	CmdFlagFUA        = uint16(1 << 0)
	CmdFlagNoHole     = uint16(1 << 1)
	CmdFlagDF         = uint16(1 << 2)
	CmdFlagReqOne     = uint16(1 << 3)
	CmdFlagFastZero   = uint16(1 << 4)
	CmdFlagPayloadLen = uint16(1 << 5) // with extended headers: the length is that of data that follow
)

// Flags and types of reply chunks, structured and extended; bit 15 of a type marks an error.
const (
	ReplyFlagDone           = uint16(1 << 0)
	ReplyTypeNone           = uint16(0)
	ReplyTypeOffsetData     = uint16(1)
	ReplyTypeOffsetHole     = uint16(2)
	ReplyTypeBlockStatus    = uint16(5)
	ReplyTypeBlockStatusExt = uint16(6)
	ReplyTypeErr            = uint16(1 << 15)
	ReplyTypeError          = ReplyTypeErr | 1
	ReplyTypeErrorOffset    = ReplyTypeErr | 2
)

// Errno is an error code of the wire; 0 is success.
type Errno uint32

// The error codes the protocol allows and this project uses.
const (
	OK        = Errno(0)
	EPERM     = Errno(gonbd.TRANSMISSION_ERROR_EPERM)
	EIO       = Errno(5)
	EINVAL    = Errno(gonbd.TRANSMISSION_ERROR_EINVAL)
	ENOSPC    = Errno(28)
	EOVERFLOW = Errno(75)
	ENOTSUP   = Errno(95)
	ESHUTDOWN = Errno(108)
)

// Error names the code.
func (e Errno) Error() string {
	switch e {
	case OK:
		return "success"
	case EPERM:
		return "EPERM: operation not permitted"
	case EIO:
		return "EIO: input/output error"
	case EINVAL:
		return "EINVAL: invalid request"
	case ENOSPC:
		return "ENOSPC: no space left on device"
	case EOVERFLOW:
		return "EOVERFLOW: too large"
	case ENOTSUP:
		return "ENOTSUP: not supported"
	case ESHUTDOWN:
		return "ESHUTDOWN: export is gone"
	}
	return fmt.Sprintf("nbd error %d", uint32(e))
}
