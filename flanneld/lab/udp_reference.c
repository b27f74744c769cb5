/* The plain way to carry IPv4 packets in UDP: one packet, one system call in, one out. The udp benchmark compiles it
 * for comparison, and the tests use it as the other end of the wire format.
 *
 * udp_reference TUN LOCAL PORT SUBNET/LEN=PEER ...
 *
 * The TUN is a plain one (no offloads). TTL is taken down by one on the way out and on the way in, as a router on
 * either side would. It carries packets until it is killed.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/ip.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_PEERS = 64, BUFFER = 65536 };

struct peer {
    uint32_t subnet, mask;
    struct sockaddr_in address;
};

static struct peer peers[MAX_PEERS];
static int peer_count;

static void die(const char *what)
{
    fprintf(stderr, "udp_reference: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_tun(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (tun < 0)
        die("/dev/net/tun");
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(tun, TUNSETIFF, &request) < 0)
        die("TUNSETIFF");
    return tun;
}

static int open_socket(const char *local, int port)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    int udp = socket(AF_INET, SOCK_DGRAM, 0);
    if (udp < 0 || inet_pton(AF_INET, local, &here.sin_addr) != 1)
        die("socket");
    if (bind(udp, (struct sockaddr *)&here, sizeof here) < 0)
        die("bind");
    return udp;
}

static void add_peer(char *text, int port)
{
    struct peer *peer = &peers[peer_count];
    char *slash = strchr(text, '/'), *equals = strchr(text, '=');
    if (peer_count == MAX_PEERS || !slash || !equals) {
        errno = EINVAL;
        die("SUBNET/LEN=PEER");
    }
    *slash = *equals = 0;
    peer->mask = htonl(~(uint32_t)0 << (32 - atoi(slash + 1)));
    peer->subnet = inet_addr(text) & peer->mask;
    peer->address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    peer->address.sin_addr.s_addr = inet_addr(equals + 1);
    peer_count++;
}

static const struct peer *find(uint32_t destination)
{
    for (int i = 0; i < peer_count; i++)
        if ((destination & peers[i].mask) == peers[i].subnet)
            return &peers[i];
    return NULL;
}

static int one_hop_less(struct iphdr *header)
{
    uint32_t check;
    if (header->ttl <= 1)
        return 0;
    header->ttl--;
    check = ntohs(header->check) + 0x100;
    header->check = htons(check >= 0xffff ? check + 1 : check);
    return 1;
}

static int tun_to_udp(int tun, int udp, char *buffer)
{
    struct iphdr *header = (struct iphdr *)buffer;
    ssize_t size = read(tun, buffer, BUFFER);
    const struct peer *peer;
    if (size < 0)
        return 0;
    if (size < (ssize_t)sizeof *header || header->version != 4 || !(peer = find(header->daddr)) || !one_hop_less(header))
        return 1;
    (void)!sendto(udp, buffer, size, 0, (const struct sockaddr *)&peer->address, sizeof peer->address);
    return 1;
}

static int udp_to_tun(int udp, int tun, char *buffer)
{
    struct iphdr *header = (struct iphdr *)buffer;
    ssize_t size = recv(udp, buffer, BUFFER, MSG_DONTWAIT);
    if (size < 0)
        return 0;
    if (size >= (ssize_t)sizeof *header && one_hop_less(header))
        (void)!write(tun, buffer, size);
    return 1;
}

int main(int argc, char **argv)
{
    static char buffer[BUFFER];
    if (argc < 5) {
        fprintf(stderr, "usage: udp_reference TUN LOCAL PORT SUBNET/LEN=PEER ...\n");
        return 2;
    }
    for (int i = 4; i < argc; i++)
        add_peer(argv[i], atoi(argv[3]));
    int udp = open_socket(argv[2], atoi(argv[3])), tun = open_tun(argv[1]);
    struct pollfd ready[] = {{.fd = tun, .events = POLLIN}, {.fd = udp, .events = POLLIN}};
    for (;;) {
        poll(ready, 2, -1);
        while (tun_to_udp(tun, udp, buffer) + udp_to_tun(udp, tun, buffer))
            ;
    }
}
