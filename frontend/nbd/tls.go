package nbd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"graindisk/frontend/nbd/proto"
	"graindisk/internal/access"
)

// TLSFiles are PEM files.
type TLSFiles struct {
	Certificate string // the server's, with the intermediate ones after it
	Key         string // of the first certificate
	ClientCA    string // who signs the certificates that clients must show; empty = none is asked for
}

// TLS is the server's side of TLS 1.3 for any number of listeners. Every handshake looks at the
// files: what is new in them serves from then on, and as long as it is broken, the last that was
// whole does. Safe for concurrent use.
type TLS struct {
	files TLSFiles
	log   *slog.Logger

	mu    sync.Mutex
	seen  [3]string // what the files held when they were last tried
	told  string    // the last complaint about them
	inUse *tls.Config
}

// tlsFileMax bounds what is read of a file at each handshake, bytes.
const tlsFileMax = 1 << 20

// NewTLS reads the files, which must be whole and fit each other.
func NewTLS(files TLSFiles, log *slog.Logger) (*TLS, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &TLS{files: files, log: log}
	var err error
	if t.seen, err = files.read(); err != nil {
		return nil, fmt.Errorf("nbd: tls: %w", err)
	}
	if t.inUse, err = t.parse(t.seen); err != nil {
		return nil, fmt.Errorf("nbd: tls: %w", err)
	}
	return t, nil
}

func (f TLSFiles) read() (texts [3]string, err error) {
	for i, path := range []string{f.Certificate, f.Key, f.ClientCA} {
		if path == "" && i == 2 {
			continue
		}
		if texts[i], err = readSmall(path); err != nil {
			return texts, err
		}
	}
	return texts, nil
}

func readSmall(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, tlsFileMax+1))
	if err == nil && len(text) > tlsFileMax {
		err = fmt.Errorf("%s: more than %d bytes are no certificate", path, tlsFileMax)
	}
	return string(text), err
}

// parse makes a configuration of what the files hold.
func (t *TLS) parse(texts [3]string) (*tls.Config, error) {
	cert, err := tls.X509KeyPair([]byte(texts[0]), []byte(texts[1]))
	if err != nil {
		return nil, fmt.Errorf("certificate %s with key %s: %w", t.files.Certificate, t.files.Key, err)
	}
	if now := time.Now(); now.After(cert.Leaf.NotAfter) || now.Before(cert.Leaf.NotBefore) {
		t.log.Warn("tls certificate is not valid now; clients that check it will refuse it",
			"file", t.files.Certificate, "not_before", cert.Leaf.NotBefore, "not_after", cert.Leaf.NotAfter)
	}
	c := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		// A ticket would let a client in again after its authority has been taken out of the file.
		SessionTicketsDisabled: true,
		// Replies come in large writes; small records at the start of a connection gain nothing.
		DynamicRecordSizingDisabled: true,
	}
	if t.files.ClientCA != "" {
		c.ClientCAs = x509.NewCertPool()
		if !c.ClientCAs.AppendCertsFromPEM([]byte(texts[2])) {
			return nil, fmt.Errorf("client authorities %s: no certificate in it", t.files.ClientCA)
		}
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
}

// config looks at the files and returns what serves the next handshake.
func (t *TLS) config() *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	texts, err := t.files.read()
	if err == nil && texts == t.seen {
		return t.inUse
	}
	var next *tls.Config
	if err == nil {
		t.seen = texts // even if it is broken: it is tried once
		next, err = t.parse(texts)
	}
	switch {
	case err == nil:
		t.inUse, t.told = next, ""
		t.log.Info("tls files have changed and are in use", "certificate", t.files.Certificate)
	case err.Error() != t.told:
		t.told = err.Error()
		t.log.Error("tls files have changed and cannot be used; the old ones stay in use", "error", err)
	}
	return t.inUse
}

var (
	errPlain    = errors.New("client wanted an export without TLS, which this listener requires")
	errInjected = errors.New("client sent more after STARTTLS before TLS began")
)

// secure answers STARTTLS, and every option while this listener waits for it; the others it leaves.
func (c *conn) secure(opt uint32, data []byte) (answered bool, err error) {
	switch {
	case c.listen.TLS == nil:
		return false, nil // STARTTLS is unknown like any other
	case opt == proto.OptStartTLS:
		return true, c.startTLS(data)
	case c.secured || !c.listen.TLSRequired || opt == proto.OptAbort:
		return false, nil
	case opt == proto.OptExportName:
		return true, errPlain // it has no refusal but the end
	}
	return true, c.refuse(opt, proto.RepErrTLSReqd, "this listener requires TLS; send STARTTLS first")
}

// startTLS goes over to TLS. Whatever plain text had a part in before counts no more, and plain text
// that is here already can only be a stranger's: the client waits for the answer.
func (c *conn) startTLS(data []byte) error {
	switch {
	case c.secured:
		return c.refuse(proto.OptStartTLS, proto.RepErrInvalid, "TLS is on already")
	case len(data) > 0:
		return c.refuse(proto.OptStartTLS, proto.RepErrInvalid, "STARTTLS takes no data")
	case c.in.buffered() > 0:
		return errInjected
	}
	conf := c.listen.TLS.config()
	if err := c.reply(proto.OptStartTLS, proto.RepAck, nil); err != nil {
		return err
	}
	sock := tls.Server(c.sock, conf)
	if err := sock.HandshakeContext(c.ctx); err != nil { // within the deadline of the whole handshake
		if !errors.Is(err, context.Canceled) {
			c.log.Warn("tls handshake failed", "error", err)
		}
		return fmt.Errorf("tls: %w", err)
	}
	c.stream, c.in.sock = sock, sock
	c.box.secure(sock)
	c.forgetHaggled()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.secured, c.granted = true, access.None
	if state := sock.ConnectionState(); len(state.VerifiedChains) > 0 {
		c.peer.Cert = state.PeerCertificates[0]
		c.log = c.log.With("cn", c.peer.Cert.Subject.CommonName)
	}
	return nil
}
