// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IIdentityRegistry, IReputationRegistry} from "./IRegistries.sol";

/// @title The reputation registry of ERC-8004, for local chains
/// @notice Keeps what clients say of agents. It does not know whether they were clients at all: who reads it
/// checks the payment that each entry's file points at, and counts the rest for nothing.
contract ReputationRegistry is IReputationRegistry {
    struct Feedback {
        int128 value;
        uint8 valueDecimals;
        bool isRevoked;
        string tag1;
        string tag2;
    }

    uint8 private constant MAX_DECIMALS = 18;
    int128 private constant MAX_VALUE = 1e38;

    IIdentityRegistry private immutable _identities;
    mapping(uint256 agentId => address[]) private _clients;
    mapping(uint256 agentId => mapping(address client => Feedback[])) private _feedback;
    mapping(bytes32 place => mapping(address responder => uint64)) private _responses;
    mapping(bytes32 place => address[]) private _responders;

    constructor(address identityRegistry) {
        _identities = IIdentityRegistry(identityRegistry);
    }

    function getIdentityRegistry() external view returns (address) {
        return address(_identities);
    }

    /// @inheritdoc IReputationRegistry
    function giveFeedback(
        uint256 agentId,
        int128 value,
        uint8 valueDecimals,
        string calldata tag1,
        string calldata tag2,
        string calldata endpoint,
        string calldata feedbackURI,
        bytes32 feedbackHash
    ) external {
        if (valueDecimals > MAX_DECIMALS || value > MAX_VALUE || value < -MAX_VALUE) {
            revert BadValue(value, valueDecimals);
        }
        // Reverts for an agent that does not exist.
        if (_identities.isAuthorizedOrOwner(msg.sender, agentId)) revert OwnFeedback(agentId, msg.sender);
        Feedback[] storage entries = _feedback[agentId][msg.sender];
        if (entries.length == 0) _clients[agentId].push(msg.sender);
        entries.push(Feedback(value, valueDecimals, false, tag1, tag2));
        emit NewFeedback(
            agentId,
            msg.sender,
            uint64(entries.length),
            value,
            valueDecimals,
            tag1,
            tag1,
            tag2,
            endpoint,
            feedbackURI,
            feedbackHash
        );
    }

    function revokeFeedback(uint256 agentId, uint64 feedbackIndex) external {
        Feedback storage entry = _entry(agentId, msg.sender, feedbackIndex);
        if (entry.isRevoked) revert AlreadyRevoked(agentId, feedbackIndex);
        entry.isRevoked = true;
        emit FeedbackRevoked(agentId, msg.sender, feedbackIndex);
    }

    /// @inheritdoc IReputationRegistry
    function appendResponse(
        uint256 agentId,
        address clientAddress,
        uint64 feedbackIndex,
        string calldata responseURI,
        bytes32 responseHash
    ) external {
        _entry(agentId, clientAddress, feedbackIndex);
        bytes32 place = keccak256(abi.encode(agentId, clientAddress, feedbackIndex));
        if (_responses[place][msg.sender]++ == 0) _responders[place].push(msg.sender);
        emit ResponseAppended(agentId, clientAddress, feedbackIndex, msg.sender, responseURI, responseHash);
    }

    /// @inheritdoc IReputationRegistry
    function getSummary(uint256 agentId, address[] calldata clientAddresses, string calldata tag1, string calldata tag2)
        external
        view
        returns (uint64 count, int128 summaryValue, uint8 summaryValueDecimals)
    {
        require(clientAddresses.length > 0, "clientAddresses required");
        uint64[19] memory used;
        int256 sum; // In the finest unit.
        for (uint256 i = 0; i < clientAddresses.length; ++i) {
            Feedback[] storage entries = _feedback[agentId][clientAddresses[i]];
            for (uint256 j = 0; j < entries.length; ++j) {
                if (!_counts(entries[j], tag1, tag2, false)) continue;
                uint8 decimals = entries[j].valueDecimals;
                sum += int256(entries[j].value) * int256(10 ** uint256(MAX_DECIMALS - decimals));
                ++used[decimals];
                ++count;
            }
        }
        if (count == 0) return (0, 0, 0);
        for (uint8 d = 1; d <= MAX_DECIMALS; ++d) {
            if (used[d] > used[summaryValueDecimals]) summaryValueDecimals = d;
        }
        int256 mean = sum / int256(uint256(count)) / int256(10 ** uint256(MAX_DECIMALS - summaryValueDecimals));
        summaryValue = int128(mean);
    }

    function readFeedback(uint256 agentId, address clientAddress, uint64 feedbackIndex)
        external
        view
        returns (int128 value, uint8 valueDecimals, string memory tag1, string memory tag2, bool isRevoked)
    {
        Feedback storage entry = _entry(agentId, clientAddress, feedbackIndex);
        return (entry.value, entry.valueDecimals, entry.tag1, entry.tag2, entry.isRevoked);
    }

    /// @inheritdoc IReputationRegistry
    function readAllFeedback(
        uint256 agentId,
        address[] calldata clientAddresses,
        string calldata tag1,
        string calldata tag2,
        bool includeRevoked
    )
        external
        view
        returns (
            address[] memory clients,
            uint64[] memory feedbackIndexes,
            int128[] memory values,
            uint8[] memory valueDecimals,
            string[] memory tag1s,
            string[] memory tag2s,
            bool[] memory revokedStatuses
        )
    {
        address[] memory asked = clientAddresses;
        if (asked.length == 0) asked = _clients[agentId];
        uint256 total;
        for (uint256 i = 0; i < asked.length; ++i) {
            Feedback[] storage entries = _feedback[agentId][asked[i]];
            for (uint256 j = 0; j < entries.length; ++j) {
                if (_counts(entries[j], tag1, tag2, includeRevoked)) ++total;
            }
        }
        (clients, feedbackIndexes, values) = (new address[](total), new uint64[](total), new int128[](total));
        (valueDecimals, tag1s, tag2s) = (new uint8[](total), new string[](total), new string[](total));
        revokedStatuses = new bool[](total);
        uint256 n;
        for (uint256 i = 0; i < asked.length; ++i) {
            Feedback[] storage entries = _feedback[agentId][asked[i]];
            for (uint256 j = 0; j < entries.length; ++j) {
                Feedback storage entry = entries[j];
                if (!_counts(entry, tag1, tag2, includeRevoked)) continue;
                (clients[n], feedbackIndexes[n], values[n]) = (asked[i], uint64(j + 1), entry.value);
                (valueDecimals[n], tag1s[n], tag2s[n]) = (entry.valueDecimals, entry.tag1, entry.tag2);
                revokedStatuses[n++] = entry.isRevoked;
            }
        }
    }

    /// @inheritdoc IReputationRegistry
    function getResponseCount(
        uint256 agentId,
        address clientAddress,
        uint64 feedbackIndex,
        address[] calldata responders
    ) external view returns (uint64 count) {
        if (clientAddress != address(0)) return _countOf(agentId, clientAddress, feedbackIndex, responders);
        address[] storage all = _clients[agentId];
        for (uint256 i = 0; i < all.length; ++i) count += _countOf(agentId, all[i], 0, responders);
    }

    function getClients(uint256 agentId) external view returns (address[] memory) {
        return _clients[agentId];
    }

    function getLastIndex(uint256 agentId, address clientAddress) external view returns (uint64) {
        return uint64(_feedback[agentId][clientAddress].length);
    }

    function _countOf(uint256 agentId, address client, uint64 index, address[] calldata responders)
        private
        view
        returns (uint64 count)
    {
        uint64 first = index == 0 ? 1 : index;
        uint64 last = index == 0 ? uint64(_feedback[agentId][client].length) : index;
        for (uint64 i = first; i <= last; ++i) {
            bytes32 place = keccak256(abi.encode(agentId, client, i));
            address[] memory who = responders;
            if (who.length == 0) who = _responders[place];
            for (uint256 j = 0; j < who.length; ++j) count += _responses[place][who[j]];
        }
    }

    function _entry(uint256 agentId, address client, uint64 index) private view returns (Feedback storage) {
        Feedback[] storage entries = _feedback[agentId][client];
        if (index == 0 || index > entries.length) revert NoSuchFeedback(agentId, client, index);
        return entries[index - 1];
    }

    function _counts(Feedback storage entry, string calldata tag1, string calldata tag2, bool revokedToo)
        private
        view
        returns (bool)
    {
        return (revokedToo || !entry.isRevoked) && _matches(entry.tag1, tag1) && _matches(entry.tag2, tag2);
    }

    function _matches(string memory tag, string calldata wanted) private pure returns (bool) {
        return bytes(wanted).length == 0 || keccak256(bytes(tag)) == keccak256(bytes(wanted));
    }
}
