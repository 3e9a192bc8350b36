// Package config is the gateway's configuration: one YAML file, or the embedded default in its
// place, with every key also as an environment variable. Load reports every problem at once, each
// with its line, and a Config it returned needs no further checking.
//
// How a value gets its way, the later winning:
//
//	default ─► YAML file or embedded default ─► GATEWAY_… environment ─► derived ─► checked
//
// An environment variable is GATEWAY_ and the key in capitals, its levels joined by underscores, with
// '-' and '.' in names as underscores too. An element of a list goes by its name or its number:
//
//	tier.size                                        GATEWAY_TIER_SIZE
//	pools.main.max_dirty_age                         GATEWAY_POOLS_MAIN_MAX_DIRTY_AGE
//	pools.main.targets[0].s3.bucket (name: aws-eu)   GATEWAY_POOLS_MAIN_TARGETS_AWS_EU_S3_BUCKET
//	                                                 GATEWAY_POOLS_MAIN_TARGETS_0_S3_BUCKET
//	listen.nbd                                       GATEWAY_LISTEN_NBD=unix:///a.sock,tcp://[::1]:10809
//
// It can change what the file has and add keys to it, but not add a pool, a target or a disk. A
// GATEWAY_… variable that names no key is an error, like any unknown key; GATEWAY_CONFIG names the
// file itself, and GATEWAY_PORT… and GATEWAY_SERVICE_… are left to Kubernetes and Docker, which set
// them for a service called "gateway".
//
// Secrets come from the environment, from files, or from the SDK's own chain. They are of type
// Secret, which prints itself as stars.
package config

import (
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Config is a checked configuration with all defaults filled in.
type Config struct {
	// Data is the directory of the gateway's own state: lock, admin socket. Absolute.
	Data   string `yaml:"data"`
	Listen Listen `yaml:"listen"`
	Tier   Tier   `yaml:"tier"`
	// ShutdownTimeout is how long a clean close waits for the targets; default 45 s.
	ShutdownTimeout time.Duration   `yaml:"shutdown_timeout"`
	Pools           map[string]Pool `yaml:"pools"`

	// Embedded says that there was no file: a pool may be created where nothing is yet.
	Embedded bool `yaml:"-"`
	// Source names the configuration in messages: the file's path, or "embedded default".
	Source string `yaml:"-"`
}

// Listen is where clients find the gateway.
type Listen struct {
	// NBD listeners; default one unix socket, nbd.sock below Config.Data.
	NBD []Listener `yaml:"nbd"`
	// Metrics is the host:port of the Prometheus endpoint; empty means none.
	Metrics string `yaml:"metrics,omitempty"`
}

// Listener is one NBD listener. In YAML it may be its address alone.
type Listener struct {
	Address string `yaml:"address"` // unix:///absolute/path or tcp://host:port
	Ack     Ack    `yaml:"ack"`     // default written for unix, stable for tcp
	// Mode is the permissions of a unix socket, in octal; default 0600.
	Mode string `yaml:"mode,omitempty"`

	// TLS; default require with a certificate, else off.
	TLS         TLS    `yaml:"tls,omitempty"`
	Certificate string `yaml:"certificate,omitempty"` // PEM file, the server's certificate first
	Key         string `yaml:"key,omitempty"`         // PEM file of its key
	// ClientCA is a PEM file of authorities: every client that uses TLS must show a certificate by one.
	ClientCA string `yaml:"client_ca,omitempty"`

	// Allow are the clients that may use the listener; empty = all. The rules of a disk come on top.
	Allow []Rule `yaml:"allow,omitempty"`
}

// TLS says whether a listener speaks it.
type TLS string

// The values of TLS.
const (
	TLSOff     TLS = "off"
	TLSOffer   TLS = "offer"   // to those who ask for it
	TLSRequire TLS = "require" // of everybody
)

// Rule names clients, in the form that package access reads.
type Rule string

// UnixMode is the permissions of the listener's socket, if it is a unix one.
func (l Listener) UnixMode() fs.FileMode {
	if mode, err := parseMode(l.Mode); err == nil {
		return mode
	}
	return 0o600
}

func parseMode(s string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 || n&0o600 != 0o600 {
		return 0, fmt.Errorf("%q is not an octal mode such as 0660 that lets the owner read and write", s)
	}
	return fs.FileMode(n), nil
}

// UnmarshalText reads a listener that is written as its address alone.
func (l *Listener) UnmarshalText(b []byte) error {
	*l = Listener{Address: strings.TrimSpace(string(b))}
	return nil
}

// Network is "unix" or "tcp", for net.Listen.
func (l Listener) Network() string {
	network, _, _ := strings.Cut(l.Address, "://")
	return network
}

// Addr is the socket's path or host:port, for net.Listen.
func (l Listener) Addr() string {
	_, addr, _ := strings.Cut(l.Address, "://")
	return addr
}

// URI is the NBD URI of a disk behind the listener: nbd+unix:///disk?socket=/path or
// nbd://host:port/disk, with nbds where TLS is required. addr is the address the listener really has (its port may have been 0);
// empty means the configured one.
func (l Listener) URI(disk, addr string) string {
	if addr == "" {
		addr = l.Addr()
	}
	scheme := "nbd"
	if l.TLS == TLSRequire {
		scheme = "nbds"
	}
	if l.Network() == "unix" {
		return scheme + "+unix:///" + disk + "?socket=" + escapeQuery(addr)
	}
	return scheme + "://" + addr + "/" + disk
}

// escapeQuery escapes what cannot stand in a query value, and nothing else: people read it.
func escapeQuery(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("/._-~:@", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// Ack says when a write is acknowledged.
type Ack string

// The values of Ack.
const (
	AckWritten Ack = "written" // once it survives the gateway's crash
	AckStable  Ack = "stable"  // once it survives the host's
)

// Tier is the local SSD space of all pools: log and cache.
type Tier struct {
	Dir  string `yaml:"dir"`  // default tier below Config.Data
	Size Bytes  `yaml:"size"` // default the lesser of 10 GiB and 20 % of the free space; at least TierSizeMin
	RAM  Bytes  `yaml:"ram"`  // the cache in memory; default 256 MiB, at least RAMMin
}

// Pool is a set of targets, a stripe profile, and disks.
type Pool struct {
	// Stripe is k+m; default 1+0 on one target, 1+1 on two, 2+1 on three to five, 4+2 on six and more, witnesses aside.
	Stripe Stripe `yaml:"stripe"`
	// MaxDirtyAge bounds the age of unpublished writes while enough targets answer; default 30 s.
	MaxDirtyAge time.Duration `yaml:"max_dirty_age"`
	// MaxExposure and MaxExposureAge are how much may be unpublished, and how old it may be: there new
	// writes wait. Default 0, no bound; else at least 64 MiB, and twice MaxDirtyAge.
	MaxExposure    Bytes         `yaml:"max_exposure,omitempty"`
	MaxExposureAge time.Duration `yaml:"max_exposure_age,omitempty"`
	// DeleteGrace is how long what nothing needs stays on the targets, for readers of an older root; default 24 h.
	DeleteGrace time.Duration `yaml:"delete_grace,omitempty"`
	// UndeleteWindow is how long a deleted disk can be had back; default 24 h.
	UndeleteWindow time.Duration `yaml:"undelete_window,omitempty"`
	// RepairRate is how fast lost shards are restored in the background, in bytes per second; default 32 MiB.
	RepairRate Bytes `yaml:"repair_rate,omitempty"`
	// Beat is the most time between an owner's signs of life, default 30 s, 0 for none but its commits; Watch is how long
	// an owner must have given none before its pool may be taken over, default 75 s, 0 for not at all.
	Beat  time.Duration `yaml:"beat"`
	Watch time.Duration `yaml:"watch"`
	// Compression packs new segments; default none. What is stored already stays as it is.
	Compression Compression `yaml:"compression"`
	// ScrubPeriod is the time in which everything on the targets is read and checked once, at ScrubRate bytes a
	// second at most; 0 = never by itself. Default 720 h and 32 MiB; else at least one hour, and 64 KiB.
	ScrubPeriod time.Duration `yaml:"scrub_period"`
	ScrubRate   Bytes         `yaml:"scrub_rate"`
	Targets     []Target      `yaml:"targets"`
	Disks       []Disk        `yaml:"disks,omitempty"` // made at start if they are missing
}

// Compression is how the data in new segments is packed, where that saves at least an eighth.
type Compression string

// The values of Compression, by what they cost in processor time.
const (
	CompressionNone Compression = "none"
	CompressionS2   Compression = "s2"
	CompressionZstd Compression = "zstd"
)

// Stripe is how many data and parity shards a segment has.
type Stripe struct {
	Data   int `yaml:"data" range:"1-16"`
	Parity int `yaml:"parity" range:"0-4"`
}

// String prints the profile as "2+1".
func (s Stripe) String() string { return fmt.Sprintf("%d+%d", s.Data, s.Parity) }

// Target is one place for shards: exactly one of S3, Azure and Local is set.
type Target struct {
	Name  string `yaml:"name"`
	S3    *S3    `yaml:"s3,omitempty"`
	Azure *Azure `yaml:"azure,omitempty"`
	Local *Local `yaml:"local,omitempty"`
	// Witness targets hold a copy of the root and nothing else: they only help to tell who owns the pool.
	Witness bool `yaml:"witness,omitempty"`

	Limits Limits `yaml:"limits,omitempty"`
	Prices Prices `yaml:"prices,omitempty"`
}

// S3 is a bucket, or a prefix in one. Without keys and credentials file the SDK's own chain is asked.
type S3 struct {
	Bucket    string `yaml:"bucket"`
	Region    string `yaml:"region,omitempty"`   // default us-east-1 when there is an endpoint
	Endpoint  string `yaml:"endpoint,omitempty"` // http://… or https://…; empty means AWS
	PathStyle bool   `yaml:"path_style,omitempty"`
	Prefix    string `yaml:"prefix,omitempty"`
	CAFile    string `yaml:"ca_file,omitempty"` // PEM file of certificate authorities, instead of the system's

	// MultipartAbove is the size from which on objects are put in parts; 5 MiB to 5 GiB, default 64 MiB.
	MultipartAbove Bytes  `yaml:"multipart_above,omitempty"`
	StorageClass   string `yaml:"storage_class,omitempty"` // of objects of 128 KiB and more; none that is an archive
	// SSE is AES256, aws:kms or aws:kms:dsse; empty means as the bucket says.
	SSE      string `yaml:"sse,omitempty"`
	KMSKeyID string `yaml:"sse_kms_key_id,omitempty"` // empty means the account's
	// Checksum goes with what is stored: crc32c (the default), md5 or none.
	Checksum string `yaml:"checksum,omitempty"`

	AccessKeyID     Secret `yaml:"access_key_id,omitempty"`
	SecretAccessKey Secret `yaml:"secret_access_key,omitempty"`
	SessionToken    Secret `yaml:"session_token,omitempty"`
	// CredentialsFile is in the form of ~/.aws/credentials, and read again each minute; Profile is its section,
	// default "default". With a ConfigFile, in the form of ~/.aws/config, or without any file, the SDK's own
	// chain looks for the profile, which then may name a role, a process or a single sign-on.
	CredentialsFile string `yaml:"credentials_file,omitempty"`
	ConfigFile      string `yaml:"config_file,omitempty"`
	Profile         string `yaml:"profile,omitempty"`
	// RoleARN is a role that the credentials assume.
	RoleARN         string `yaml:"role_arn,omitempty"`
	ExternalID      string `yaml:"external_id,omitempty"`       // what the role's owner wants to hear
	RoleSessionName string `yaml:"role_session_name,omitempty"` // in the owner's audit log; default graindisk
	STSEndpoint     string `yaml:"sts_endpoint,omitempty"`      // empty means AWS
}

// Azure is a blob container, or a prefix in one. Without a key, a SAS or a connection string the SDK's own
// chain is asked.
type Azure struct {
	Account   string `yaml:"account,omitempty"` // may be left out with a connection string
	Container string `yaml:"container"`
	Endpoint  string `yaml:"endpoint,omitempty"` // empty means https://ACCOUNT.blob.core.windows.net
	Prefix    string `yaml:"prefix,omitempty"`
	CAFile    string `yaml:"ca_file,omitempty"` // PEM file of certificate authorities, instead of the system's

	AccountKey       Secret `yaml:"account_key,omitempty"`
	SAS              Secret `yaml:"sas,omitempty"`
	ConnectionString Secret `yaml:"connection_string,omitempty"`
	// CredentialsFile holds one of the three as KEY=VALUE, by the names above.
	CredentialsFile string `yaml:"credentials_file,omitempty"`
}

// Local is a directory.
type Local struct {
	Dir string `yaml:"dir"`
}

// Disk is a disk to be made at start if the pool has none of that name.
type Disk struct {
	Name string `yaml:"name"`
	Size Bytes  `yaml:"size"`
	// Allow and AllowRead are the clients that may write and read it, and those that may only read it.
	// Without either every client of every listener may write.
	Allow     []Rule `yaml:"allow,omitempty"`
	AllowRead []Rule `yaml:"allow_read,omitempty"`
}

// Secret is a string that no message, log or dump shows.
type Secret string

// String is stars, or nothing for an empty secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "********"
}

// GoString is String: %#v tells nothing either.
func (s Secret) GoString() string { return s.String() }

// MarshalText is String, for YAML and JSON.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Defaults and bounds.
const (
	TierSizeMin        = 512 * MiB // eight slots of 64 MiB
	TierSizeDefaultMax = 10 * GiB
	RAMMin             = 16 * MiB
	ramDefault         = 256 * MiB
	maxDirtyAgeMin     = time.Second
	maxExposureMin     = 64 * MiB // two full segments
	scrubPeriodDefault = 30 * 24 * time.Hour
	scrubPeriodMin     = time.Hour
	scrubRateDefault   = 32 * MiB
	scrubRateMin       = 64 * KiB
	maxDirtyAgeDefault = 30 * time.Second
	beatMin            = 100 * time.Millisecond
	beatDefault        = 30 * time.Second // 86 400 puts in 30 days
	watchDefault       = 75 * time.Second // two beats and a half
	shutdownDefault    = 45 * time.Second
	socketPathMax      = 107 // sun_path holds 108 bytes with its closing zero
)

// AdminSocket is the path of the admin API's socket.
func (c *Config) AdminSocket() string { return filepath.Join(c.Data, "admin.sock") }

// HandoverSocket is the path of the socket on which the next process asks for this one's sockets.
func (c *Config) HandoverSocket() string { return filepath.Join(c.Data, "next.sock") }

// derive fills in what depends on other values, but for the tier's size. It keeps what is set.
func (c *Config) derive() {
	if c.Data == "" {
		return // reported by the checks; nothing to derive from
	}
	if len(c.Listen.NBD) == 0 {
		c.Listen.NBD = []Listener{{Address: "unix://" + filepath.Join(c.Data, "nbd.sock")}}
	}
	for i := range c.Listen.NBD {
		if l := &c.Listen.NBD[i]; l.Ack == "" {
			l.Ack = AckStable
			if l.Network() == "unix" {
				l.Ack = AckWritten
			}
		}
		if l := &c.Listen.NBD[i]; l.TLS == "" && l.Certificate != "" {
			l.TLS = TLSRequire
		}
	}
	if c.Tier.Dir == "" {
		c.Tier.Dir = filepath.Join(c.Data, "tier")
	}
	for name, p := range c.Pools {
		if p.Stripe == (Stripe{}) {
			p.Stripe = defaultStripe(p.dataTargets())
		}
		if p.Compression == "" {
			p.Compression = CompressionNone
		}
		c.Pools[name] = p
		for _, t := range p.Targets {
			if t.S3 != nil && t.S3.Region == "" && t.S3.Endpoint != "" {
				t.S3.Region = "us-east-1"
			}
		}
	}
}

// dataTargets is how many targets hold shards.
func (p Pool) dataTargets() (n int) {
	for _, t := range p.Targets {
		if !t.Witness {
			n++
		}
	}
	return n
}

// defaultStripe is the profile for n targets with shards when none is configured. Two targets get 1+1, which without a
// witness the checks refuse with the reason: a choice that only the user can make.
func defaultStripe(n int) Stripe {
	switch {
	case n <= 1:
		return Stripe{1, 0}
	case n == 2:
		return Stripe{1, 1}
	case n <= 5:
		return Stripe{2, 1}
	}
	return Stripe{4, 2}
}

// checkAddress says what is wrong with the address of an NBD listener.
func checkAddress(s string) error {
	network, addr, ok := strings.Cut(s, "://")
	switch {
	case !ok, network != "unix" && network != "tcp":
		return fmt.Errorf("must be unix:///path or tcp://host:port")
	case network == "tcp":
		return checkHostPort(addr)
	case !strings.HasPrefix(addr, "/"):
		return fmt.Errorf("the socket's path must be absolute: unix:///path")
	}
	return checkSocketPath(addr)
}

func checkSocketPath(p string) error {
	if len(p) > socketPathMax {
		return fmt.Errorf("socket path %s has %d bytes, the system allows %d", p, len(p), socketPathMax)
	}
	return nil
}

func checkHostPort(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("must be host:port")
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("port %q: must be 0 to 65535", port)
	}
	return nil
}
