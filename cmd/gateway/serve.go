package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"graindisk/api"
	"graindisk/config"
	"graindisk/frontend/nbd"
)

type serveOptions struct {
	disks    []string
	takeover bool
	replace  bool
	debug    bool
}

func newServeCmd(a *app) *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the disks of the configured pools over NBD",
		Long: `Serve stays in the foreground, logs on stderr, and prints one line on stdout once clients are
accepted: "ready URI [URI...]". SIGTERM and SIGINT end it cleanly: everything is published and the
pools are released. If the targets do not answer within shutdown_timeout it ends with code 1, the log
intact and the pools held; start it again to go on.

With --replace it takes over from the gateway that runs on the same data directory, if one does: that
one hands over its listening sockets, answers what it has read and ends, and this one goes on from its
log. Clients see their connection close and are let in again when they connect anew. Sockets that
systemd passes (LISTEN_FDS) are used where the configuration names their addresses.

SIGHUP reads the configuration again and puts the disks' access rules in force. TLS certificates are
looked at whenever a client comes.

With --data DIR and no configuration file it runs the embedded default: pool main on the directories
DIR/targets/{a,b,c}, which it creates if nothing is there yet.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runServe(cmd.Context(), a, o) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.disks, "disk", nil, "with --data: a disk to serve, NAME=SIZE, created if it is missing (repeatable)")
	f.BoolVar(&o.takeover, "takeover", false, "take pools that another owner holds, giving up what that owner acknowledged but did not publish")
	f.BoolVar(&o.replace, "replace", false, "take over from the gateway that runs on this data directory, without refusing a client")
	f.BoolVar(&o.debug, "debug", false, "log more")
	return cmd
}

func runServe(ctx context.Context, a *app, o serveOptions) (err error) {
	cfg, err := a.loadConfig(o.disks)
	if err != nil {
		return err
	}
	log := newLogger(a, o.debug)
	reload := newReloader(func() (*config.Config, error) { return a.loadConfig(o.disks) })
	defer reload.stop()
	in, wait, err := inherit(ctx, cfg, o.replace, log)
	if err != nil {
		return err
	}
	defer in.close()
	data, err := lockData(ctx, cfg.Data, wait)
	if err != nil {
		return err
	}
	defer data.unlock()
	if cfg.Embedded {
		log.Info("embedded default", "data", cfg.Data, "targets", filepath.Join(cfg.Data, "targets", "{a,b,c}"),
			"stripe", cfg.Pools["main"].Stripe.String(), "tier", cfg.Tier.Dir, "tier_size", cfg.Tier.Size.String(),
			"ram", cfg.Tier.RAM.String(), "max_dirty_age", cfg.Pools["main"].MaxDirtyAge.String())
	}
	limitMemory(cfg, log)
	g, err := openGateway(ctx, cfg, o.takeover, data, log)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		log.Info("ended before serving")
		return nil
	}
	if err != nil {
		return err
	}
	alive, dying := context.WithCancel(context.WithoutCancel(ctx))
	var signing sync.WaitGroup
	signing.Go(func() { data.signLife(alive, g.tenures, log) })
	handed, serveErr := serveClients(ctx, a, cfg, in, reload, g, log)
	dying()
	signing.Wait()
	if handed {
		return errors.Join(serveErr, g.abandon())
	}
	data.takeBack(log) // closing gives the pools away
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownTimeout)
	defer cancel()
	return errors.Join(serveErr, g.close(cctx))
}

// inherited is what a process has before it opens its pools: sockets of others, and the options of
// its NBD listeners.
type inherited struct {
	systemd, running *nbd.Inherited
	options          []nbd.ListenOptions
}

func (in *inherited) close() {
	in.systemd.Close()
	in.running.Close()
}

// take is nil if nobody passed a socket for that address.
func (in *inherited) take(address string) *nbd.Socket {
	if s := in.running.Take(address); s != nil {
		return s
	}
	return in.systemd.Take(address)
}

// inherit gathers the sockets that others have opened. What could be wrong with the configuration is
// found before a running gateway is asked for its sockets. wait is how long that one may take to end.
func inherit(ctx context.Context, cfg *config.Config, replace bool, log *slog.Logger) (in *inherited, wait time.Duration, err error) {
	in = new(inherited)
	if in.options, err = listenOptions(cfg, log); err != nil {
		return nil, 0, err
	}
	if in.systemd, err = nbd.Activated(); err != nil {
		return nil, 0, err
	}
	if !replace {
		return in, 0, nil
	}
	if in.running, err = requestHandover(ctx, cfg.HandoverSocket()); err != nil {
		in.close()
		return nil, 0, err
	}
	if in.running == nil {
		log.Info("no gateway runs on this data directory; there is nothing to replace")
		return in, 0, nil
	}
	return in, handoverDrain + cfg.ShutdownTimeout, nil
}

// serveClients opens the sockets, says that they are ready, and serves until ctx ends or the next
// process has taken the sockets over (handed); then requests already read are answered. It returns nil if
// one of these ended it.
func serveClients(ctx context.Context, a *app, cfg *config.Config, in *inherited, r *reloader, g *gateway, log *slog.Logger) (handed bool, err error) {
	m := newMetrics(g)
	srv, err := nbd.New(nbd.Options{Exports: g, Log: log, Metrics: m.nbd(), Access: g.level})
	if err != nil {
		return false, err
	}
	g.drop = srv.Drop
	socks, err := listenAll(cfg, in)
	if err != nil {
		return false, err
	}
	ctx, end := context.WithCancel(ctx)
	defer end()
	var over atomic.Bool
	// The listeners end with sctx: when ctx does, or when one of them fails. NBD is drained instead.
	eg, sctx := errgroup.WithContext(ctx)
	metrics := promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
	eg.Go(func() error { return api.Serve(sctx, socks.admin, api.Handler(g, metrics), log) })
	if socks.metrics != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", metrics)
		eg.Go(func() error { return api.Serve(sctx, socks.metrics, mux, log) })
	}
	eg.Go(func() error {
		return serveHandover(sctx, socks.next, socks.passed, log, func() { over.Store(true); end() })
	})
	eg.Go(func() error { return r.run(sctx, g, srv, log) })
	for i, ln := range socks.nbd {
		eg.Go(func() error {
			err := srv.Serve(context.WithoutCancel(ctx), ln, in.options[i])
			if errors.Is(err, nbd.ErrShutdown) {
				return nil
			}
			return fmt.Errorf("listener %s: %w", cfg.Listen.NBD[i].Address, err)
		})
	}
	eg.Go(func() error {
		<-sctx.Done()
		log.Info("shutting down")
		drain := cfg.ShutdownTimeout
		if over.Load() {
			drain = min(drain, handoverDrain)
		}
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		err := srv.Shutdown(dctx)
		if over.Load() && errors.Is(err, context.DeadlineExceeded) {
			log.Warn("some requests still waited; their clients will ask again")
			return nil
		}
		return err
	})
	fmt.Fprintln(a.stdout, "ready", strings.Join(uris(cfg, g, socks), " "))
	err = eg.Wait()
	return over.Load(), err
}

// uris are those of every disk behind every NBD listener, or of the listeners if there is no disk.
func uris(cfg *config.Config, g *gateway, s *sockets) []string {
	var out []string
	names := g.List()
	if len(names) == 0 {
		names = []string{""}
	}
	for i, ln := range s.nbd {
		for _, d := range names {
			out = append(out, cfg.Listen.NBD[i].URI(d, ln.Addr().String()))
		}
	}
	return out
}

// sockets are everything a gateway listens on.
type sockets struct {
	nbd     []net.Listener
	admin   net.Listener
	metrics net.Listener // may be nil
	next    net.Listener // where the next process asks for the others
	passed  []nbd.Socket // the others
}

// listenAll takes or opens every socket of the configuration, or none.
func listenAll(cfg *config.Config, in *inherited) (_ *sockets, err error) {
	s := new(sockets)
	defer func() {
		if err != nil {
			for _, p := range s.passed {
				p.Listener.Close()
			}
		}
	}()
	add := func(network, addr string, mode os.FileMode) (net.Listener, error) {
		p := in.take(network + "://" + addr)
		if p == nil {
			l, err := listen(network, addr, mode)
			if err != nil {
				return nil, err
			}
			p = &nbd.Socket{Address: network + "://" + addr, Listener: l, Unlink: true}
		}
		s.passed = append(s.passed, *p)
		return p.Listener, nil
	}
	for _, n := range cfg.Listen.NBD {
		l, err := add(n.Network(), n.Addr(), n.UnixMode())
		if err != nil {
			return nil, err
		}
		s.nbd = append(s.nbd, l)
	}
	if s.admin, err = add("unix", cfg.AdminSocket(), 0o600); err != nil {
		return nil, err
	}
	if cfg.Listen.Metrics != "" {
		if s.metrics, err = add("tcp", cfg.Listen.Metrics, 0); err != nil {
			return nil, err
		}
	}
	if rest := in.systemd.Rest(); len(rest) > 0 {
		return nil, fmt.Errorf("systemd passed a socket for %s, which the configuration does not name; add it to listen.nbd, or take it out of the socket unit", strings.Join(rest, " and "))
	}
	in.running.Close() // addresses that are no longer configured
	if s.next, err = listen("unix", cfg.HandoverSocket(), 0o600); err != nil {
		return nil, err
	}
	return s, nil
}

// listen opens one socket, a unix one with that mode. A unix socket that a dead gateway left behind is replaced: the caller holds
// the lock of the data directory. One that somebody answers on is not.
func listen(network, addr string, mode os.FileMode) (net.Listener, error) {
	if network == "unix" {
		if err := os.MkdirAll(filepath.Dir(addr), 0o700); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
		if c, err := net.Dial("unix", addr); err == nil {
			c.Close()
			return nil, fmt.Errorf("listen on %s: another process answers there; stop it, or configure another socket", addr)
		}
	}
	l, err := nbd.Listen(network+"://"+addr, true)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	if network == "unix" && mode != 0o600 {
		if err := os.Chmod(addr, mode); err != nil {
			l.Close()
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
	}
	return l, nil
}

func newLogger(a *app, debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	o := &slog.HandlerOptions{Level: level}
	if a.json {
		return slog.New(slog.NewJSONHandler(a.stderr, o))
	}
	return slog.New(slog.NewTextHandler(a.stderr, o))
}
